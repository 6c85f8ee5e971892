"""What a run leaves on disk: its checkpoint, its log, and what it came from. A kill at any moment leaves a good one."""

import csv
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

_DAMAGED = (RuntimeError, ValueError, EOFError, KeyError)
"""What torch raises for files that aren't whole."""


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message names the file and what was expected."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` beside ``path`` and move it there, so that a kill or a full disk keeps the last good one."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def save_text(path: Path, text: str) -> None:
    """As ``save``, what people and other programs read."""
    partial = path.with_suffix(f"{path.suffix}.partial")
    try:
        partial.write_text(text)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing but tensors and plain values is ever unpickled.

    Raises:
        CheckpointError: no such file, or not a checkpoint.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror or error})") from None
    except Exception as error:
        # For foreign files torch raises pickle.UnpicklingError, which advises to read them in unsafe ways.
        if not (isinstance(error, _DAMAGED) or type(error).__name__ == "UnpicklingError"):
            raise
        raise CheckpointError(f"{path}: not a checkpoint, or damaged") from None
    if not isinstance(state, dict) or "run" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of veilcam-train")
    return state


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits of a finished run's SHA-256, by which what was made from it knows it again.

    Raises:
        CheckpointError: no such file.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise CheckpointError(f"{path}: no such checkpoint ({error.strerror})") from None


class Log:
    """A CSV file of one row each report, continued where an interrupted run left it."""

    def __init__(self, path: Path, keep_until: int) -> None:
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                # A kill may have left a part of the last row.
                whole = [row for row in csv.DictReader(file) if None not in row.values()]
                rows = [row for row in whole if row["iteration"].isdigit() and int(row["iteration"]) <= keep_until]
        partial = path.with_suffix(".partial")
        self._writer: csv.DictWriter[str] | None = None
        self._file = partial.open("w", newline="")
        for row in rows:
            self.write(row)
        partial.replace(path)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and flush it; the first row names the columns."""
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(row))
            self._writer.writeheader()
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def provenance() -> dict[str, str]:
    """Commit (with + where the tree had changes), versions and processor that a result comes from.

    Where the code runs outside of its repository, as in a container, ``TRAIN_COMMIT`` names the commit: not a name
    that begins as the service's settings do, which it would refuse.
    """
    commit = os.environ.get("TRAIN_COMMIT") or _commit() or "unknown"
    return {"commit": commit, "torch": str(torch.__version__), "processor": processor()}


@cache
def _commit() -> str:
    """Asked once: what is checked out later, this process doesn't run. Nothing where git doesn't know this file."""
    git, here = shutil.which("git"), Path(__file__)
    if git is None:
        return ""
    asked = ["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty=+", "--abbrev=12"]
    known, told = (
        subprocess.run([git, *each], cwd=here.parent, capture_output=True, text=True)  # noqa: S603
        for each in asked
    )
    return "" if known.returncode else told.stdout.strip()


def processor() -> str:
    """The processor's name and number of cores, as the system tells it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"
