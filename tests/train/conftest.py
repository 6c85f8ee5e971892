"""Small real training data: crops of the shipped clip as a folder of photographs."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray


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
