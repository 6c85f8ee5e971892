"""CIFAR-10 and MNIST: labelled gray pictures, small enough to stay in memory as they are.

A set is looked for in the folder that the user names, then in a cache, and then at its public address.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from train.data import cifar10, mnist
from train.data.files import Arrays, DataError, NoSuchSetError

log = logging.getLogger("veilcam.train")

WHITE = 255.0
SIDE = 32
"""Of the block, and so of the pictures that networks look at."""


@dataclass(frozen=True)
class Pictures:
    """Labelled gray pictures.

    Attributes:
        x: uint8 (N, 1, H, W).
        y: int64 (N,), 0..9.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, places: slice) -> "Pictures":
        return Pictures(self.x[places], self.y[places])

    def to(self, device: torch.device) -> "Pictures":
        """The same pictures in a device's memory."""
        return Pictures(self.x.to(device), self.y.to(device))

    def batch(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures in [0, 1] and labels at some places."""
        return self.x[places].float() / WHITE, self.y[places]

    def all(self) -> tuple[Tensor, Tensor]:
        """Every picture in [0, 1], and the labels."""
        return self.x.float() / WHITE, self.y


@dataclass(frozen=True)
class SmallSet:
    """A labelled set: what is learned from, and what is measured on."""

    name: str
    train: Pictures
    test: Pictures


@dataclass(frozen=True)
class _Source:
    read: Callable[[Path], Arrays]
    """Reads a folder that holds the set in any of its forms."""
    fetch: Callable[[Path], None]
    """Puts the public originals into a folder."""
    sizes: tuple[int, int]
    """Of the official set: pictures to learn from, and to test."""
    learned_from: slice
    told: str


_SOURCES: Mapping[str, _Source] = {
    "cifar10": _Source(cifar10.read, cifar10.fetch, (50_000, 10_000), slice(0, None), "all that are there"),
    "mnist": _Source(
        mnist.read, mnist.fetch, (60_000, 10_000), slice(5_000, None), "all but the first 5,000: the usual 55,000"
    ),
}


def open_set(name: str, folders: Sequence[Path], cache: Path) -> SmallSet:
    """Open a set and say aloud where it came from: the first of the folders that has it, the cache, its public address.

    Args:
        name: cifar10 or mnist.
        folders: where the set's files may lie, or lie in a folder of the set's name.
        cache: where public originals are kept, a folder per set.

    Raises:
        DataError: one of the folders isn't there, a file isn't what it should be, or the original can't be fetched.
    """
    source = _SOURCES[name]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
    places = [folder / name if (folder / name).is_dir() else folder for folder in folders]
    for place in (*places, cache / name):
        try:
            return _checked(name, source, place, source.read(place))
        except NoSuchSetError as error:
            log.info("%s: %s", name, error)
    log.info("%s: fetching the public original", name)
    source.fetch(cache / name)
    return _checked(name, source, cache / name, source.read(cache / name))


def _checked(name: str, source: _Source, place: Path, arrays: Arrays) -> SmallSet:
    train, test = (Pictures(torch.from_numpy(x)[:, None], torch.from_numpy(y).long()) for x, y in arrays)
    if (len(train), len(test)) != source.sizes:
        log.warning(
            "%s: %d and %d pictures, the official set has %d and %d", place, len(train), len(test), *source.sizes
        )
    learned_from = train[source.learned_from]
    if not len(learned_from):
        raise DataError(f"{place}: {len(train)} training pictures, learned from are {source.told}")
    log.info("%s from %s: %d to learn from (%s), %d to test", name, place, len(learned_from), source.told, len(test))
    return SmallSet(name, learned_from, test)


class Batches:
    """An endless shuffled walk through a set in which batch k is a function of the seed and k alone.

    Because no state moves along, a run that goes on at iteration k sees what it would have seen.
    """

    def __init__(self, pictures: Pictures, size: int, seed: int) -> None:
        self._pictures, self._size, self._seed = pictures, size, seed
        self._per_pass = len(pictures) // size
        if not self._per_pass:
            raise DataError(f"{len(pictures)} pictures to learn from, expected at least a batch of {size}")
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def at(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Pictures (size, 1, H, W) in [0, 1] and labels (size,) of an iteration, counted from 0."""
        number, place = divmod(iteration, self._per_pass)
        if self._order[0] != number:
            shuffle = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            order = torch.randperm(len(self._pictures), generator=shuffle).to(self._pictures.x.device)
            self._order = (number, order)
        return self._pictures.batch(self._order[1][place * self._size : (place + 1) * self._size])


def padded(pictures: Tensor, side: int = SIDE) -> Tensor:
    """Black around pictures (N, 1, H, W) up to a side: MNIST's 28×28 as one block of 32×32, CIFAR-10 as it is."""
    height, width = pictures.shape[-2:]
    top, left = (side - height) // 2, (side - width) // 2
    return functional.pad(pictures, (left, side - width - left, top, side - height - top))


def cropped(pictures: Tensor, like: Tensor) -> Tensor:
    """The middle of padded pictures, as large as others: what PSNR is measured on."""
    height, width = like.shape[-2:]
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    return pictures[..., top : top + height, left : left + width]


def moved(pictures: Tensor, generator: torch.Generator, mirror: bool, by: int = 4) -> Tensor:
    """Pictures moved by up to ``by`` pixels, zeros coming in, and half of them mirrored: what a classifier learns from.

    Args:
        pictures: (N, C, H, W); all of a picture's channels move together.
        generator: of the CPU, so that a run draws the same on any device.
        mirror: not for digits.
    """
    count, _, height, width = pictures.shape
    wider = functional.pad(pictures, (by,) * 4)
    down, right = torch.randint(0, 2 * by + 1, (2, count, 1, 1), generator=generator).to(
        pictures.device, non_blocking=True
    )
    rows = down + torch.arange(height, device=pictures.device).reshape(1, -1, 1)
    columns = right + torch.arange(width, device=pictures.device).reshape(1, 1, -1)
    if mirror:
        flip = (torch.rand(count, 1, 1, generator=generator) < 0.5).to(pictures.device, non_blocking=True)
        columns = torch.where(flip, columns.flip(-1), columns)
    picture = torch.arange(count, device=pictures.device).reshape(-1, 1, 1)
    return wider[picture, :, rows, columns].permute(0, 3, 1, 2)
