"""CIFAR-10 (Krizhevsky 2009) in gray: ITU-R 601 luma of the colours, rounded to 8 bits.

Two forms are read: the official binaries (data_batch_1.bin to _5, test_batch.bin: a label byte, then 32×32 red, green
and blue), also inside of their archive; and lossless gray mosaics with label arrays (train_00.webp, train_labels.npy).
"""

import tarfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from train.data import files
from train.data.files import Arrays, DataError, NoSuchSetError, Split

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"

_SIDE = 32
_RECORD = 1 + 3 * _SIDE**2
_TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
_TEST = ("test_batch.bin",)
_ARCHIVE = "cifar-10-binary.tar.gz"
_UNPACKED = "cifar-10-batches-bin"
_ROWS, _COLUMNS = 100, 50


def read(folder: Path) -> Arrays:
    """Read the set from a folder in whichever form is there.

    Raises:
        FileNotFoundError: neither form is there.
        DataError: a file is missing, short or isn't what it should be.
    """
    for place in (folder, folder / _UNPACKED):
        if (place / _TRAIN[0]).exists():
            return _read_binaries(place, _TRAIN), _read_binaries(place, _TEST)
    if (folder / "train_labels.npy").exists():
        return _read_mosaics(folder, "train"), _read_mosaics(folder, "test")
    if (folder / _ARCHIVE).exists():
        return _read_archive(folder / _ARCHIVE)
    raise NoSuchSetError(folder, f"{_TRAIN[0]} (official binary), {_ARCHIVE} or train_labels.npy (mosaics)")


def fetch(folder: Path) -> None:
    """Fetch the official archive, 162 MB, into a folder."""
    files.fetch(ADDRESS, folder / _ARCHIVE, MD5)


def _read_binaries(folder: Path, names: tuple[str, ...]) -> Split:
    parts = []
    for name in names:
        path = folder / name
        try:
            parts.append(_gray(path, path.read_bytes()))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
    return _joined(parts)


def _read_archive(path: Path) -> Arrays:
    splits = []
    try:
        with tarfile.open(path) as archive:
            held = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}
            for names in (_TRAIN, _TEST):
                parts = []
                for name in names:
                    file = archive.extractfile(held[name]) if name in held else None
                    if file is None:
                        raise DataError(f"{path}: no {name} in it")
                    parts.append(_gray(path / name, file.read()))
                splits.append(_joined(parts))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: not the official archive ({error})") from None
    return splits[0], splits[1]


def _gray(path: Path, content: bytes) -> Split:
    if not content or len(content) % _RECORD:
        raise DataError(f"{path}: {len(content)} bytes, expected records of {_RECORD}")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    colours = records[:, 1:].reshape(-1, 3, _SIDE, _SIDE).astype(np.uint32)
    # Luma as Pillow's convert("L") rounds it.
    luma = (colours[:, 0] * 19595 + colours[:, 1] * 38470 + colours[:, 2] * 7471 + 0x8000) >> 16
    return files.check_split(path, luma.astype(np.uint8), records[:, 0].copy(), _SIDE)


def _read_mosaics(folder: Path, split: str) -> Split:
    path = folder / f"{split}_labels.npy"
    try:
        with path.open("rb") as file:
            labels: NDArray[np.uint8] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not an array of labels ({error})") from None
    if labels.ndim != 1 or not len(labels):
        raise DataError(f"{path}: labels of shape {labels.shape}, expected one a picture")
    tiles = []
    for number in range(-(-len(labels) // (_ROWS * _COLUMNS))):
        path = folder / f"{split}_{number:02d}.webp"
        try:
            with Image.open(path) as picture:
                mosaic = np.asarray(picture.convert("RGB"))[..., 0]
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path}: not a mosaic ({error})") from None
        if mosaic.shape != (_ROWS * _SIDE, _COLUMNS * _SIDE):
            raise DataError(f"{path}: {mosaic.shape} pixels, expected {(_ROWS * _SIDE, _COLUMNS * _SIDE)}")
        tiles.append(mosaic.reshape(_ROWS, _SIDE, _COLUMNS, _SIDE).transpose(0, 2, 1, 3).reshape(-1, _SIDE, _SIDE))
    return files.check_split(folder / f"{split}_labels.npy", np.concatenate(tiles), labels, _SIDE)


def _joined(parts: list[Split]) -> Split:
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
