"""MNIST (LeCun, Cortes and Burges): the official idx files, gzipped or not, or train.npz and test.npz (x, y)."""

import gzip
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data import files
from train.data.files import Arrays, DataError, NoSuchSetError, Split

ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb89873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}

SIDE = 28


def read(folder: Path) -> Arrays:
    """Read the set from a folder in whichever form is there.

    Raises:
        FileNotFoundError: neither form is there.
        DataError: a file is missing, short or isn't what it should be.
    """
    if (folder / "train.npz").exists():
        return _read_npz(folder / "train.npz"), _read_npz(folder / "test.npz")
    if all((folder / name).exists() or (folder / name.removesuffix(".gz")).exists() for name in MD5):
        return _read_idx(folder, "train"), _read_idx(folder, "t10k")
    raise NoSuchSetError(folder, f"{', '.join(MD5)} or train.npz")


def fetch(folder: Path) -> None:
    """Fetch the four official files, 12 MB, into a folder."""
    for name, md5 in MD5.items():
        files.fetch(ADDRESS + name, folder / name, md5)


def _read_npz(path: Path) -> Split:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return files.check_split(path, archive["x"], archive["y"], SIDE)
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a packed set ({error})") from None


def _read_idx(folder: Path, name: str) -> Split:
    x, y = _idx(folder / f"{name}-images-idx3-ubyte", 3), _idx(folder / f"{name}-labels-idx1-ubyte", 1)
    return files.check_split(folder / f"{name}-images-idx3-ubyte", x, y, SIDE)


def _idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    packed = path.with_name(path.name + ".gz")
    try:
        content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{packed}: not an idx file ({error})") from None
    head = 4 * (1 + dimensions)
    if len(content) < head or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path}: not an idx file of bytes in {dimensions} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) - head != int(np.prod(shape)):
        raise DataError(f"{path}: {len(content) - head} bytes, expected {shape}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy()
