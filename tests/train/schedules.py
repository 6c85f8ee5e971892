"""Small schedules of the paper's runs, and the command."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from train.cli import app
from train.devices import Device
from train.settings import CSNetRun

CPU = Device(torch.device("cpu"), False, "CPU")
CSNET = CSNetRun(ratio=0.1, iterations=10, batch=10, start="principal", drops=(8,), learning_rate=1e-4)
FILES = {
    "csnet-r10": """
        kind = "csnet"
        ratio = 0.1
        start = "principal"
        iterations = 4
        batch = 20
        learning_rate = 1e-4
    """,
    "inception": """
        kind = "classifier"
        network = "inception"
        iterations = 8
        warm_up = 5
        batch = 20
    """,
    "adv-csnet-vgg-r10": """
        kind = "adversarial"
        extends = "csnet-r10"
        classifier = "inception"
        iterations = 4
        batch = 20
    """,
    "adv-csnet-e-r10": """
        kind = "ensemble"
        extends = "csnet-r10"
        surrogates = ["inception"]
        iterations = 4
        batch = 20
    """,
    "measurement": """
        kind = "measurement"
        readers = ["inception"]
        retrained = ["adv-csnet-e-*"]
        retrained_iterations = 3
    """,
}


def write_schedule(folder: Path, **changed: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**FILES, **changed}.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


@contextmanager
def no_bar(name: str, total: int) -> Iterator[Any]:
    yield lambda row: None


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output
