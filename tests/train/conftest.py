"""Small real training data, and a small schedule that is done."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.train.drawn import write_cifar10
from tests.train.schedules import no_bar, write_schedule
from train.data.small import SmallSet, open_set
from train.devices import find_device
from train.reproduce import Runner, Schedule


@pytest.fixture(scope="session")
def folder(photographs: list[NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight gray photographs of 160×224."""
    path = tmp_path_factory.mktemp("photographs")
    for index, picture in enumerate(photographs):
        cv2.imwrite(str(path / f"{index}.png"), picture[::2, ::2][:160, :224])
    return path


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in one order, so that equal runs are equal to the bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("data") / "cifar10")


@pytest.fixture(scope="session")
def data(data_folder: Path) -> SmallSet:
    return open_set("cifar10", [data_folder], data_folder)


@pytest.fixture(scope="session")
def done(data: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Schedule, Path]:
    """A finished small schedule, in the precision that the command trains in here."""
    torch.set_num_threads(1)
    schedule = Schedule(write_schedule(tmp_path_factory.mktemp("schedules") / "reduced"))
    runs = tmp_path_factory.mktemp("runs") / "reduced"
    runner = Runner(schedule, runs, find_device(), lambda name: data, no_bar)
    for step in schedule.steps():
        assert not runner.done(step)
        runner.do(step)
        assert runner.done(step)
    return schedule, runs
