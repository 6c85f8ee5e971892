"""Files of public data sets: checked when they are read, fetched with checksum, progress bar and resume."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

Split = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Pictures (N, H, W) and labels (N,)."""
Arrays = tuple[Split, Split]
"""To learn from, and to test."""

_PIECE = 1 << 18


class DataError(ValueError):
    """Data that can't be used or fetched; the message names the file and what was expected."""


class NoSuchSetError(FileNotFoundError, DataError):
    """A folder without the set; says what was looked for."""

    def __init__(self, folder: Path, expected: str) -> None:
        super().__init__(f"{folder}: no data set there, expected {expected}")


def check_split(path: Path, x: NDArray[np.uint8], y: NDArray[np.uint8], side: int) -> Split:
    """Refuse arrays that aren't labelled gray pictures of a side."""
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1:] != (side, side):
        raise DataError(f"{path}: pictures are {x.dtype} {x.shape}, expected uint8 (N, {side}, {side})")
    if y.ndim != 1 or len(y) != len(x) or not len(y) or y.dtype.kind not in "iu":
        raise DataError(f"{path}: {y.dtype} {y.shape} labels for {len(x)} pictures, expected a whole number each")
    if int(y.min()) < 0 or int(y.max()) > 9:
        raise DataError(f"{path}: labels {int(y.min())} to {int(y.max())}, expected 0 to 9")
    return x, y


def fetch(address: str, path: Path, md5: str) -> None:
    """Fetch a public file, going on where an interrupted fetch stopped; nothing is left at ``path`` unless whole.

    A file that is there already stays as it is.

    Raises:
        DataError: unreachable, or other content than expected.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    begun = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={begun}-"} if begun else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            going_on = answer.status == 206
            _receive(answer, partial, begun if going_on else 0, path.name)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # what is there already goes to the end
            raise DataError(f"{address}: {error.code} {error.reason}; or name a folder that has it (--data)") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        told = getattr(error, "reason", error)
        raise DataError(f"{address}: {told}; run again to go on, or name a folder that has it (--data)") from None
    digest = hashlib.md5(partial.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != md5:
        partial.unlink()
        raise DataError(f"{address}: MD5 {digest}, expected {md5}; what came was deleted")
    partial.replace(path)


def _receive(answer: "urllib.request._UrlopenRet", partial: Path, begun: int, name: str) -> None:
    length = answer.headers.get("Content-Length")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns) as bar, partial.open("ab" if begun else "wb") as file:
        task = bar.add_task(name, total=begun + int(length) if length else None, completed=begun)
        while piece := answer.read(_PIECE):
            file.write(piece)
            bar.advance(task, len(piece))
        if length and file.tell() < begun + int(length):
            raise OSError(f"ended after {file.tell()} of {begun + int(length)} bytes")
