"""Frames on the camera's disk until the server has them: bounded in size and age, there after a kill.

DIR/CAMERA/ holds parts, which are segments as recordings have them (protos/segment.py), the number of the last run, and
a lock. A part is deleted when all its frames are kept by the server. One of an outage, or of a run before, is *late*:
it is taken, oldest first, and sent as a backlog.
"""

import contextlib
import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from encoder.spool.drops import Drops
from encoder.spool.folder import Folder, cause
from encoder.spool.left import READ_AGAIN_S, begin, read_part
from encoder.spool.part import Part
from protos.segment import SUFFIX, SegmentUnreadableError, SegmentWriter
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.encode")

LEAST_BYTES = 1 << 20
"""A spool has room for so many."""

_PART_S, _LATE_PART_S, _PART_BYTES = 4.0, 60.0, 4 << 20
"""A part ends after so long, longer while nothing is sent, or with so many bytes, at the next key frame."""
_TEND_EVERY_S = 1.0
_MOST_ON_WAY = 10_000
"""Frames sent of which the server may yet tell that it keeps them; older ones are late, if they are here."""
_UNKEPT_S = 60.0
"""A server that takes frames and keeps none for so long can't, and that is told."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FLUSH_S = 10.0
"""What the server hasn't taken for so long is brought onto the disk itself; until then a loss of power takes it."""
_FULL, _DISK_FULL = "no more fits into --spool-size", "the disk is full"


class SpoolError(Exception):
    """A spool that can't be used; the message names its folder."""


class Spool:
    """The spool of one camera; every call is safe in any thread.

    Args:
        folder: of the spools of all cameras here; made, for its owner alone, if it isn't there.
        camera: its name.
        size: bytes at most, ``LEAST_BYTES`` or more.
        hours: older frames are dropped.
        dropped: counts frames by reason: ``spool full``, ``spool old``, ``spool damaged``, ``spool unwritable``, and
            those that were ``lost on the way`` because they couldn't be written here.

    Raises:
        SpoolError: it can't be made, or another process has it.

    Attributes:
        path: of its own folder, DIR/CAMERA.
        epoch: number of this run, greater than that of every run before.
        late: frames that the server has recorded from a backlog.
    """

    def __init__(self, folder: Path, camera: str, size: int, hours: float, dropped: Counter[str]) -> None:
        self.late = 0
        self._size, self._hours, self._dropped = size, hours, dropped
        self._lock = threading.RLock()
        self._writer: SegmentWriter | None = None
        self._writing: Part | None = None
        self._on_way: dict[int, Part | None] = {}
        self._broken = False
        self._unwritten = 0
        self._unkept_since, self._keeps = time.monotonic(), True
        self._tended = 0.0
        try:
            self._folder = Folder(folder, camera)
            self.path = self._folder.path
            try:
                self.epoch, self._parts = begin(self._folder, dropped)
            except OSError:
                self._folder.close()
                raise
        except BlockingIOError:
            raise SpoolError(f"--spool {folder / camera}: another veilcam-encode has it") from None
        except OSError as error:
            raise SpoolError(f"--spool {error.filename or folder / camera}: can't be used ({cause(error)})") from None
        self._drops = Drops(self._folder.path)
        self._total = sum(part.size for part in self._parts)
        self._bound()
        self._drops.tell()
        self._folder.tell_others()

    @property
    def waiting(self) -> int:
        """Frames here that the server isn't known to have."""
        with self._lock:
            return sum(len(part.pending) for part in self._parts)

    @property
    def needs_key(self) -> bool:
        """Whether only a key frame can be kept now."""
        with self._lock:
            return self._writing is None and not self._broken

    def told(self) -> str:
        """For people: what is here, and what was sent from here."""
        with self._lock:
            size = sum(part.size for part in self._parts if part.pending)
            return f"in the spool {self.waiting} ({size / 1e6:.1f} MB), sent late {self.late}"

    def append(self, hello: pb.Hello, frame: pb.Frame, sent: bool) -> None:
        """Keep a frame until the server has it.

        Args:
            hello: what it is sent under.
            sent: it goes out now as well; otherwise it is late.
        """
        with self._lock:
            key = frame.kind == pb.FRAME_KIND_KEY
            if self._writing is not None and key and self._is_over(self._writing, hello, sent):
                self._end()
            stored = self._write(hello, frame) if key or self._writing is not None else False
            if sent:
                if not self._on_way:
                    self._unkept_since = time.monotonic()
                self._on_way[frame.sequence] = self._writing if stored else None
                if len(self._on_way) > _MOST_ON_WAY and self._on_way.pop(next(iter(self._on_way))) is None:
                    self._dropped["lost on the way"] += 1
            elif not stored:
                self._dropped["spool unwritable" if self._broken else "spool full"] += 1
                if self._broken:
                    self._unwritten += 1
                else:
                    self._drops.add(_FULL, 1, frame.capture_time_ns, frame.capture_time_ns)
            self._bound()
            self._drops.tell()

    def keep(self, kept: Sequence[pb.Sequences]) -> None:
        """The server has these frames of this run."""
        with self._lock:
            self._unkept_since = time.monotonic()
            if not self._keeps:
                self._keeps = True
                log.info("spool %s: the server keeps frames again", self._folder.path)
            newest = max((each.last for each in kept), default=0)
            for sequence in [sequence for sequence in self._on_way if sequence <= newest]:
                has = any(each.first <= sequence <= each.last for each in kept)
                if self._on_way.pop(sequence) is None and not has:
                    self._dropped["lost on the way"] += 1
            oldest = min((each.first for each in kept), default=0)
            for part in list(self._parts):
                if part.epoch == self.epoch and part.last >= oldest and part.pending:
                    for each in kept:
                        part.pending.remove(each.first, each.last)
                    self._delete_if_through(part)

    def lose(self, last: int) -> None:
        """A connection is over: what was on the way on it, and ended with this frame, is late now."""
        with self._lock:
            for sequence in [sequence for sequence in self._on_way if sequence <= last]:
                self._dropped["lost on the way"] += self._on_way.pop(sequence) is None

    def take(self) -> Part | None:
        """The oldest late part, to be sent; ``done`` or ``put_back`` follows."""
        with self._lock:
            first, now = next(iter(self._on_way), None), time.monotonic()
            for part in self._parts:
                on_way = first is not None and part.epoch == self.epoch and part.last >= first
                if part is not self._writing and part.pending and not on_way and part.not_before <= now:
                    part.sending = True
                    return part
            return None

    @property
    def put_off(self) -> int:
        """Late frames whose part isn't to be sent before a while."""
        with self._lock:
            now = time.monotonic()
            return sum(len(part.pending) for part in self._parts if part.not_before > now)

    def pending_of(self, part: Part) -> list[int]:
        """Sequences of a part's frames that the server isn't known to have now, in order."""
        with self._lock:
            return list(part.pending)

    def done(self, part: Part, last: int, read: Collection[int], recorded: int) -> None:
        """The server has all that could be read of a part up to a frame.

        Args:
            last: that frame's sequence.
            read: sequences of those frames.
            recorded: how many of them it hadn't had.
        """
        with self._lock:
            part.sending = False
            self.late += recorded
            lost = {sequence for sequence in part.pending if sequence <= last}.difference(read)
            if lost:
                log.warning("spool: %s is damaged: %d frames are lost", part.path.name, len(lost))
                self._dropped["spool damaged"] += len(lost)
            part.pending.remove(0, last)
            self._delete_if_through(part)

    def put_back(self, part: Part, wait_s: float = 0.0) -> None:
        """A part couldn't be sent; not again before a while."""
        with self._lock:
            part.sending = False
            part.not_before = time.monotonic() + wait_s
            self._delete_if_through(part)

    def tend(self) -> None:
        """Drop what is too old, read what couldn't be read, bring what has waited for a while onto the disk itself, and
        tell of a server that keeps nothing. May be slow."""
        if time.monotonic() - self._tended < _TEND_EVERY_S:
            return
        self._tended = time.monotonic()
        self._read_again()
        with self._lock:
            now = time.monotonic()
            for part in list(self._parts):
                if part is not self._writing and not part.sending and now - part.written > self._hours * 3600:
                    self._drop(part, "spool old", "it was older than --spool-hours")
                self._delete_if_through(part)
            self._drops.tell()
            if self._keeps and self._on_way and now - self._unkept_since > _UNKEPT_S:
                self._keeps = False
                log.warning(
                    "spool %s: the server takes frames and has kept none for %.0f s (its log says why); they wait here",
                    *(self._folder.path, now - self._unkept_since),
                )
            due = [part for part in self._parts if part.unflushed and part.pending and now - part.flushed > _FLUSH_S]
        for part in due:
            self._flush(part)

    def close(self) -> None:
        """Leave what is late to the next run."""
        with self._lock:
            self.lose(max(self._on_way, default=0))
            self._end()
            self._drops.tell(at_once=True)
            self._folder.close()

    def _is_over(self, part: Part, hello: pb.Hello, sent: bool) -> bool:
        oldest, first = next(iter(part.pending), None), next(iter(self._on_way), None)
        late = oldest is not None and (first is None or oldest < first)
        long = time.monotonic() - part.began > (_PART_S if sent else _LATE_PART_S)
        return long or part.size > min(_PART_BYTES, self._room() // 8) or part.hello != hello or (late and sent)

    def _room(self) -> int:
        """Bytes that the spool can have: as many as it may, or as the disk has for it."""
        with contextlib.suppress(OSError):  # whatever it is, it is told when a frame is written
            disk = os.statvfs(self._folder.path)
            return min(self._size, self._total + disk.f_bavail * disk.f_frsize)
        return self._size

    def _write(self, hello: pb.Hello, frame: pb.Frame) -> bool:
        """Whether it could be; on a full disk the oldest parts make room for it, one after the other."""
        while True:
            try:
                part, writer = self._opened(hello, frame)
                writer.append(frame, time.time_ns())
                break
            except OSError as error:
                if error.errno in _NO_ROOM and self._drop_oldest(_DISK_FULL):
                    continue
                self._tell_broken(error)
                writing = self._writing
                self._end()
                if writing is not None and error.errno in _NO_ROOM:  # a newer one may have its room
                    self._drop(writing, "spool full", _DISK_FULL)
                return False
        part.pending.add(frame.sequence)
        part.last, part.written = frame.sequence, time.monotonic()
        part.captured = part.captured[0] or frame.capture_time_ns, frame.capture_time_ns
        self._total += writer.size_on_disk - part.size
        part.size, part.unflushed = writer.size_on_disk, True
        if self._broken:
            self._broken = False
            log.info("spool %s: frames are kept again; %d were not", self._folder.path, self._unwritten)
            self._unwritten = 0
        return True

    def _opened(self, hello: pb.Hello, frame: pb.Frame) -> tuple[Part, SegmentWriter]:
        """The part that is written, or a new one that this frame begins."""
        if self._writing is None or self._writer is None:
            path = self._folder.path / f"{self.epoch:020d}-{frame.sequence:012d}{SUFFIX}"
            self._writer = SegmentWriter(path, hello)
            self._writing = Part(path, self.epoch, hello=pb.Hello.FromString(hello.SerializeToString()))
            self._parts.append(self._writing)
        return self._writing, self._writer

    def _flush(self, part: Part) -> None:
        """Bring a part onto the disk itself. A second try would prove nothing: a system tells of an error once."""
        with self._lock:
            part.unflushed, part.flushed = False, time.monotonic()  # before: a frame may be written meanwhile
        try:
            self._folder.flush(part.path)
        except OSError as error:
            with self._lock:
                self._tell_broken(error)

    def _tell_broken(self, error: OSError) -> None:
        if not self._broken:
            self._broken = True
            log.error("spool %s: %s; the live stream goes on", self._folder.path, error.strerror or error)

    def _end(self) -> None:
        part, self._writing = self._writing, None
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:  # as over NFS, or with a quota: its frames stay, as far as they can be read
                self._tell_broken(error)
        if part is not None:
            self._delete_if_through(part)

    def _bound(self) -> None:
        """Drop the oldest parts until the rest fits."""
        while self._total > self._size:
            if self._drop_oldest(_FULL):
                continue
            if self._writing is None:
                return
            self._end()

    def _drop_oldest(self, why: str) -> bool:
        """Drop the oldest part but for the one that is written; whether there was one that could be deleted.

        One that can't be keeps its frames.
        """
        for part in list(self._parts):
            if not part.sending and part is not self._writing and self._folder.delete(part.path):
                self._drop(part, "spool full", why)
                return True
        return False

    def _drop(self, part: Part, reason: str, why: str) -> None:
        for sequence, stored in self._on_way.items():
            if stored is part:
                self._on_way[sequence] = None
                part.pending.remove(sequence, sequence)
        count = part.indexed if part.unread else len(part.pending)
        self._dropped[reason] += count
        self._drops.add(why, count, *part.captured)
        part.pending.clear()
        part.unread = False
        self._delete_if_through(part)

    def _delete_if_through(self, part: Part) -> None:
        if part.pending or part.unread or part is self._writing or part.sending or part not in self._parts:
            return
        if self._folder.delete(part.path):
            self._parts.remove(part)
            self._total -= part.size

    def _read_again(self) -> None:
        """Look at a part again that couldn't be read; one at a time, and nothing waits for it."""
        with self._lock:
            now = time.monotonic()
            unread = next((part for part in self._parts if part.unread and part.not_before <= now), None)
        if unread is None:
            return
        try:
            found = read_part(unread.path, self._folder, self._dropped)
        except (SegmentUnreadableError, OSError):
            unread.not_before = time.monotonic() + READ_AGAIN_S
            return
        with self._lock:
            if unread in self._parts:  # not dropped meanwhile
                place = self._parts.index(unread)
                self._parts[place : place + 1] = [found] if found else []
                self._total += (found.size if found else 0) - unread.size
