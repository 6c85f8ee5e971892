"""Spools for tests: frames to keep, what is on disk, disks that fail or are small, a link with a spool."""

import contextlib
import errno
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
import pytest

from encoder.packing import Packer
from encoder.pipeline import Account, run
from encoder.sampling import Operator
from encoder.sources import Frame
from encoder.spool.spool import LEAST_BYTES, Spool
from encoder.spooled import SpooledLink
from protos.segment import Segment, SegmentError, SegmentWriter
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import hello_of

HELLO = pb.Hello(camera="camera", operator_id="0" * 16, width=64, height=48, epoch=1)
OTHER = pb.Hello(camera="camera", width=1, epoch=1)
"""It begins another part."""


def frames(count: int, size: int = 60, every: int = 4, first: int = 1) -> list[pb.Frame]:
    """Frames of random bytes, numbered from ``first`` on, every so many a key frame."""
    made, now = [], time.time_ns()
    for sequence in range(first, first + count):
        key = (sequence - first) % every == 0
        kind = pb.FRAME_KIND_KEY if key else pb.FRAME_KIND_DELTA
        told = {"kind": kind, "base_sequence": 0 if key else sequence - 1, "payload": os.urandom(size)}
        made.append(pb.Frame(sequence=sequence, capture_time_ns=now + sequence, **told))  # type: ignore[arg-type]
    return made


def late(folder: Path, *counts: int) -> Spool:
    """A spool with late parts of so many frames."""
    spool, first = Spool(folder, "camera", LEAST_BYTES, 1.0, Counter()), 1
    for number, count in enumerate(counts):
        for frame in frames(count, first=first):
            spool.append(pb.Hello(camera="camera", width=number, epoch=1), frame, sent=False)
        first += count
    spool.append(pb.Hello(camera="other", epoch=1), frames(1, first=first)[0], sent=True)  # what is live ends the last
    return spool


def spooled(folder: Path) -> set[int]:
    """Sequences of the frames in a spool that is written to."""
    found: set[int] = set()
    for path in folder.glob("camera/*.vcseg"):
        with contextlib.suppress(SegmentError, FileNotFoundError):  # not begun, or through
            found |= {entry.sequence for entry in Segment(path).entries()}
    return found


def number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def failing(path: Path) -> Path:
    """The file opens, and its first read is an EIO, as on a worn card; what it held is in the file that is returned."""
    kept = path.rename(path.with_suffix(".kept"))
    path.symlink_to("/proc/self/mem")
    return kept


def unwritable(path: Path, hello: pb.Hello) -> SegmentWriter:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def flushes(monkeypatch: pytest.MonkeyPatch, failing: Container[Path] = ()) -> list[Path]:
    """Files, in a list that grows, that were brought onto the disk itself; of one in ``failing`` it is an EIO."""
    flushed, sync = [], os.fsync

    def fsync(opened: int) -> None:
        path = Path(f"/proc/self/fd/{opened}").readlink()
        if path in failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(opened)
        flushed.append(path)

    monkeypatch.setattr(os, "fsync", fsync)
    return flushed


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of so many bytes."""
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # what failed may have a file open there


class Spooling:
    """The pipeline into a spooled link, in a thread."""

    def __init__(self, operator: Operator, address: str, folder: Path, source: Iterator[Frame], side: int = 32) -> None:
        self.account, self.stop = Account(), threading.Event()
        self.spool = Spool(folder, "camera", LEAST_BYTES, 1.0, self.account.dropped)
        hello = hello_of(operator, np.zeros((side, side), np.uint8))
        hello.epoch = self.spool.epoch
        self.link = SpooledLink(address, hello, self.account.dropped, self.spool, 1000.0, resizable=True)
        arguments = (source, Packer(operator, 0.1), self.link, self.account, self.stop)
        self.thread = threading.Thread(target=run, args=arguments)
        self.thread.start()

    def end(self) -> None:
        self.stop.set()
        self.thread.join(20)
        self.link.close()
