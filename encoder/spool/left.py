"""What the runs before have left in a spool's folder: parts to be sent, what is damaged, what can't be read for now."""

import contextlib
import logging
import os
import time
from collections import Counter
from pathlib import Path

from encoder.spool.folder import OWN, Folder
from encoder.spool.part import Part
from encoder.spool.ranges import Ranges
from protos.rules import CLOCK_SET
from protos.segment import SUFFIX, Segment, SegmentError, SegmentUnreadableError, SegmentVersionError, index_of, indexed

log = logging.getLogger("veilcam.encode")

READ_AGAIN_S = 60.0
"""A part that the system can't read stays, and is looked at again after so long."""


def begin(folder: Folder, dropped: Counter[str]) -> tuple[int, list[Part]]:
    """The number of this run, and the parts that those before have left, oldest first.

    That number is milliseconds since 1970, or more if a run before had more: a clock can go back.

    Raises:
        OSError: the folder can't be written.
    """
    before = folder.last_epoch()
    folder.write_epoch(before)  # or nothing is looked at, and nothing deleted
    parts = _found(folder, dropped)
    epoch = max(time.time_ns() // 1_000_000, before + 1, *(part.epoch + 1 for part in parts), 0)
    folder.write_epoch(epoch)
    return epoch, parts


def read_part(path: Path, folder: Folder, dropped: Counter[str]) -> Part | None:
    """A part that a run before has left; none if there is nothing in it, which is told and deleted.

    Frames that are lost with it are ``spool damaged`` in ``dropped``.

    Raises:
        SegmentUnreadableError, OSError: it can't be read for now.
    """
    try:
        segment = Segment(path)
        entries = segment.entries()
    except SegmentUnreadableError:
        raise
    except SegmentVersionError as error:
        log.warning("spool: %s; it stays where it is", error)
        return None
    except SegmentError as error:
        lost = indexed(path)
        how_many = f"{lost} frames are lost" if lost else "how many frames are lost with it isn't known"
        log.warning("spool: %s; %s", error, how_many)
        dropped["spool damaged"] += lost
        folder.delete(path)
        return None
    if not entries or not segment.hello.epoch:
        folder.delete(path)
        return None
    pending = Ranges()
    for entry in entries:
        pending.add(entry.sequence)
    captured = entries[0].capture_time_ns, entries[-1].capture_time_ns
    written, size = _written(path.stat().st_mtime), _size(path)
    return Part(path, segment.hello.epoch, pending, entries[-1].sequence, captured, written=written, size=size)


def _found(folder: Folder, dropped: Counter[str]) -> list[Part]:
    """Every part with something in it, oldest first; what can't be read for now is among them."""
    parts, told = [], False
    for path in sorted(folder.path.glob(f"*{SUFFIX}")):
        if not os.access(path, os.R_OK, effective_ids=True):
            log.warning("spool: %s can't be read by this user, and stays where it is (%s)", path, OWN)
            continue
        try:
            part = read_part(path, folder, dropped)
        except (SegmentUnreadableError, OSError) as error:
            if not told:  # once: it may be the whole disk
                told = True
                problem = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
                log.warning("spool: %s; what can't be read for now stays, and is read later", problem)
            part = _unread(path)
        if part is not None:
            parts.append(part)
    return parts


def _unread(path: Path) -> Part:
    part = Part(path, 0, unread=True, indexed=indexed(path), not_before=time.monotonic() + READ_AGAIN_S)
    with contextlib.suppress(OSError):
        told = path.stat()
        part.size, part.written = _size(path), _written(told.st_mtime)
        part.captured = (told.st_mtime_ns,) * 2  # nearly
    return part


def _size(path: Path) -> int:
    """Bytes of a part and its index."""
    return sum(each.stat().st_size for each in (path, index_of(path)) if each.exists())


def _written(modified_s: float) -> float:
    """When a part was, by the monotonic clock.

    Both times are by a clock that may have been set meanwhile: how old it is isn't known if one of them is absurd.
    """
    age = time.time() - modified_s if modified_s > CLOCK_SET else 0.0
    return time.monotonic() - max(0.0, age)
