"""Small schedules of the paper's runs, and the command."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from train import checkpoint
from train.cli import app
from train.devices import Device
from train.loops import schedule
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


class KilledError(Exception):
    pass


@contextmanager
def killed_at(iteration: int) -> Iterator[None]:
    """A training in it is killed there."""
    advance = schedule.Training.advance

    def dying(self: schedule.Training, terms: Mapping[str, torch.Tensor | float], rate: float) -> None:
        if self.iteration == iteration:
            raise KilledError
        advance(self, terms, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule.Training, "advance", dying)
        try:
            yield
        except KilledError:
            return
    raise AssertionError(f"it never came to iteration {iteration}")


def assert_ended_alike(whole: Path, killed: Path) -> None:
    """All that two runs left is equal to the bit, but for the seconds that they took."""
    for file in ("last.pt", "final.pt"):
        one, other = (checkpoint.load(folder / file) for folder in (whole, killed))
        assert same(one, other), [key for key in one if not same(one[key], other.get(key))]
    logs = [(folder / "log.csv").read_text().splitlines() for folder in (whole, killed)]
    without_seconds = [[row.rsplit(",", 1)[0] for row in log] for log in logs]
    assert without_seconds[0] == without_seconds[1]


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output
