"""Where recordings lie, FOLDER/CAMERA/START.vcseg, and how much of them is kept."""

import contextlib
import errno
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from decoder.private import make_folder
from protos.rules import CLOCK_SET
from protos.segment import SUFFIX, index_of

GAP_NS = 5_000_000_000
"""A recording that stops for longer is shown with a gap, and goes on in another segment."""
_ROOM = 64 << 20
"""Bytes made free on a full disk before recording goes on, or a tenth of a smaller one."""

_CLOCK_SET_NS = CLOCK_SET * 10**9
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""What file systems of a network or of FUSE answer that have no names to bring to a disk: the other side does it."""

log = logging.getLogger("veilcam.decode")


@dataclass(frozen=True)
class Retention:
    """How much is kept; 0 sets no limit.

    Attributes:
        hours: segments go that nothing was written to for longer.
        megabytes: of all recordings together.
        free_megabytes: left free on the disk.
    """

    hours: float = 0.0
    megabytes: int = 0
    free_megabytes: int = 1024


@dataclass(frozen=True)
class Kept:
    """A segment on disk.

    Attributes:
        start_ns: when its first frame was captured, by the camera's clock.
        received_ns: when its last frame was received, by this server's; ns since 1970, as the file's own time has it.
    """

    path: Path
    camera: str
    start_ns: int
    received_ns: int
    size: int


class Store:
    """The segments of all cameras in one folder.

    Args:
        folder: made, for its owner alone, if it isn't there.
        retention: how much is kept.

    Attributes:
        placed: segments that are there by ``place``; others are of a process before.
    """

    def __init__(self, folder: Path, retention: Retention) -> None:
        self.folder, self.retention = folder, retention
        self.placed: set[Path] = set()
        if not folder.is_dir():
            make_folder(folder)
        self._looked: set[Path] = set()
        self._stuck: set[Path] = set()

    def segments(self, camera: str | None = None) -> list[Kept]:
        """Segments of one camera or of all, in order of capture."""
        return sorted(self._found(camera), key=lambda kept: (kept.start_ns, kept.camera))

    def cameras(self) -> dict[str, int]:
        """Whose segments there are, those seen last first, and when the last frame of each was received."""
        newest: dict[str, int] = {}
        for kept in self._found(None):
            newest[kept.camera] = max(kept.received_ns, newest.get(kept.camera, 0))
        return dict(sorted(newest.items(), key=lambda each: -each[1]))

    def place(self, camera: str, start_ns: int) -> Path:
        """A new segment's path."""
        folder = self.folder / camera
        if folder not in self._looked or not folder.is_dir():
            make_folder(folder)
            self._looked.add(folder)
        path = folder / f"{start_ns:020d}{SUFFIX}"
        while path.exists():
            start_ns += 1
            path = folder / f"{start_ns:020d}{SUFFIX}"
        self.placed.add(path)
        return path

    def secure(self, path: Path) -> None:
        """Bring the name of a new segment onto the disk itself, as ``SegmentWriter.flush`` does what is in it.

        Raises:
            OSError: it can't be.
        """
        for folder in (path.parent, self.folder):
            try:
                sync(folder)
            except OSError as error:
                if error.errno not in _NO_SYNC:
                    raise

    def tidy(self, writing: set[Path], full: bool = False) -> list[Kept]:
        """Delete the segments that are beyond what is kept, those received first, and say so.

        How old one is, this server's clock says: a camera's may be decades off. What was received before that was set,
        as on a board without a battery, counts from when it is.

        Args:
            writing: segments that are still being written.
            full: the disk is full, whatever is to be left free: make some room.

        Returns:
            Those that were deleted.
        """
        deleted: list[Kept] = []
        told: Counter[tuple[int, str, str]] = Counter()
        room = self.retention.free_megabytes << 20
        if full:
            room = max(room, min(_ROOM, shutil.disk_usage(self.folder).total // 10))
        now_ns = time.time_ns()
        found = [self._dated(kept, now_ns, writing) for kept in self._found(None)]
        segments = sorted(
            (kept for kept in found if kept.path not in writing), key=lambda kept: (kept.received_ns, kept.start_ns)
        )
        total = sum(kept.size for kept in found)
        limit = self.retention.megabytes << 20
        by_age = self.retention.hours and now_ns >= _CLOCK_SET_NS
        too_old = now_ns - int(self.retention.hours * 3600e9) if by_age else 0
        # Asked once: some file systems show what was freed seconds later, when everything would be gone.
        free = shutil.disk_usage(self.folder).free
        for kept in segments:
            level = logging.INFO
            if kept.received_ns < too_old:
                reason = f"older than {self.retention.hours:g} h"
            elif limit and total > limit:
                reason = f"recordings take more than {self.retention.megabytes} MiB"
            elif free < room:
                level, reason = logging.WARNING, f"less than {room >> 20} MiB of the disk were free"
            else:
                break
            try:
                kept.path.unlink(missing_ok=True)
                index_of(kept.path).unlink(missing_ok=True)
            except OSError as error:
                if kept.path not in self._stuck:
                    log.error(
                        "recording %s can't be deleted, others go instead: %s", kept.path, error.strerror or error
                    )
                self._stuck.add(kept.path)
                continue
            self.placed.discard(kept.path)
            total -= kept.size
            free += kept.size
            deleted.append(kept)
            told[level, kept.camera, reason] += 1
        for (level, camera, reason), count in told.items():
            log.log(level, "recordings of camera %s: %d of the oldest segments deleted: %s", camera, count, reason)
        return deleted

    def _dated(self, kept: Kept, now_ns: int, writing: set[Path]) -> Kept:
        """A segment with a time at which it may have been received, once this server knows any."""
        if kept.received_ns >= _CLOCK_SET_NS or now_ns < _CLOCK_SET_NS or kept.path in writing:
            return kept
        with contextlib.suppress(OSError):  # deleted meanwhile, or another's, which is taken for new each time
            os.utime(kept.path, ns=(now_ns, now_ns))
        return replace(kept, received_ns=now_ns)

    def _found(self, camera: str | None) -> Iterator[Kept]:
        folders = [self.folder / camera] if camera is not None else [p for p in self.folder.iterdir() if p.is_dir()]
        for folder in folders:
            for path in folder.glob(f"*{SUFFIX}"):
                try:
                    told = path.stat()
                    yield Kept(path, folder.name, int(path.stem), told.st_mtime_ns, told.st_size)
                except (ValueError, FileNotFoundError):
                    continue


def sync(path: Path) -> None:
    """Bring what is in a file, or the names in a folder, onto the disk itself.

    Raises:
        OSError: it can't be.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
