"""A folder of photographs as gray pictures held in memory, and random crops of them."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from train.data.files import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm"}


_SMALLEST_VIEW = 0.75
"""Of the shorter side of a picture."""


def read_gray(path: Path) -> NDArray[np.uint8]:
    """One picture as 8-bit gray (H, W), ITU-R 601 luma of colour."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # what Pillow would make white of, but for its darkest parts
                raise DataError(f"{path}: pixels of more than 8 bits (mode {image.mode}), expected 8 a channel")
            return np.asarray(image.convert("L"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: not a picture that can be read ({error})") from None


def picture_files(folder: Path) -> list[Path]:
    """Pictures in a folder and the folders below it, sorted by path."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{folder}: no pictures in it (looked for {', '.join(sorted(SUFFIXES))})")
    return files


class Photographs:
    """All pictures of some folders, gray, in memory; draws random crops.

    The generator is all the state there is.
    """

    def __init__(self, folders: Sequence[Path], generator: torch.Generator) -> None:
        files = [path for folder in folders for path in picture_files(folder)]
        self.pictures = [torch.from_numpy(np.array(read_gray(path))) for path in files]
        self.generator = generator
        self._folders = ", ".join(map(str, folders))
        self._large: dict[int, list[Tensor]] = {}

    def batch(self, size: int, crop: int) -> Tensor:
        """(size, 1, crop, crop) float32 in [0, 1], flipped and turned at random, of pictures that are large enough.

        Raises:
            DataError: no picture is.
        """
        if crop not in self._large:
            self._large[crop] = [picture for picture in self.pictures if min(picture.shape) >= crop]
        if not self._large[crop]:
            raise DataError(f"{self._folders}: no picture is {crop} pixels high and wide")
        return torch.stack([self._crop(crop) for _ in range(size)])[:, None].float() / 255

    def views(self, size: int, side: int) -> Tensor:
        """(size, 1, side, side) float32 in [0, 1]: squares of most of a picture, as if it had been taken at that size.

        What a reader sees of a whole picture, whatever the size of the pictures at hand.
        """
        return torch.stack([self._view(side) for _ in range(size)])[:, None].float() / 255

    def _view(self, side: int) -> Tensor:
        picture = self.pictures[self._below(len(self.pictures))]
        shorter = min(picture.shape)
        square = round(shorter * (_SMALLEST_VIEW + (1 - _SMALLEST_VIEW) * self._below(1001) / 1000))
        top = self._below(picture.shape[0] - square + 1)
        left = self._below(picture.shape[1] - square + 1)
        patch = picture[top : top + square, left : left + square].numpy()
        how = cv2.INTER_AREA if square > side else cv2.INTER_CUBIC
        view = torch.from_numpy(np.asarray(cv2.resize(patch, (side, side), interpolation=how)))
        return view.flip(1) if self._below(2) else view

    def _crop(self, crop: int) -> Tensor:
        picture = self._large[crop][self._below(len(self._large[crop]))]
        top = self._below(picture.shape[0] - crop + 1)
        left = self._below(picture.shape[1] - crop + 1)
        patch = picture[top : top + crop, left : left + crop]
        if self._below(2):
            patch = patch.flip(1)
        return torch.rot90(patch, self._below(4))

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))
