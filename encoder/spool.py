"""Frames on the camera's disk until the server has them: bounded in size and age, there after a kill.

DIR/CAMERA/ holds parts, which are segments as recordings have them (protos/segment.py), the number of the last run, and
a lock. A part is deleted when all its frames are kept by the server. One of an outage, or of a run before, is *late*:
it is taken, oldest first, and sent as a backlog.
"""

import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from encoder.ranges import Ranges
from protos.rules import CLOCK_SET
from protos.segment import (
    SUFFIX,
    Segment,
    SegmentError,
    SegmentUnreadableError,
    SegmentVersionError,
    SegmentWriter,
    index_of,
    indexed,
)
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.encode")

LEAST_BYTES = 1 << 20
"""A spool has room for so many."""

_PART_S, _LATE_PART_S, _PART_BYTES = 4.0, 60.0, 4 << 20
"""A part ends after so long, longer while nothing is sent, or with so many bytes, at the next key frame."""
_TEND_EVERY_S = 1.0
_READ_AGAIN_S = 60.0
"""A part that the system can't read stays, and is looked at again after so long."""
_MOST_ON_WAY = 10_000
"""Frames sent of which the server may yet tell that it keeps them; older ones are late, if they are here."""
_LOCK_WAIT_S = 1.0
"""Another camera here looks for a moment whether this one runs."""
_UNKEPT_S = 60.0
"""A server that takes frames and keeps none for so long can't, and that is told."""
_DROPPED_EVERY_S = 60.0
"""Frames that are dropped are told at once, and then no more often."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FLUSH_S = 10.0
"""What the server hasn't taken for so long is brought onto the disk itself; until then a loss of power takes it."""


class SpoolError(Exception):
    """A spool that can't be used; the message names its folder."""


@dataclass(eq=False)
class Part:
    """One segment of a spool.

    Attributes:
        epoch: the run that it is of.
        pending: sequences of its frames that the server isn't known to have, in order.
        captured: when its first frame was, and its last, in ns since 1970.
        written: when its last frame was, by the monotonic clock; before that began, for what an earlier run has left.
        unread: what it has isn't known yet, since the system couldn't read it.
        indexed: how many frames its index has, of one that is unread.
        not_before: when it may be sent again, or read again, by the monotonic clock.
    """

    path: Path
    epoch: int
    pending: Ranges = field(default_factory=Ranges)
    last: int = 0
    captured: tuple[int, int] = (0, 0)
    written: float = field(default_factory=time.monotonic)
    size: int = 0
    hello: pb.Hello | None = None
    began: float = field(default_factory=time.monotonic)
    flushed: float = field(default_factory=time.monotonic)
    unflushed: bool = False
    sending: bool = False
    unread: bool = False
    indexed: int = 0
    not_before: float = 0.0


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
        epoch: number of this run, greater than that of every run before.
        late: frames that the server has recorded from a backlog.
    """

    def __init__(self, folder: Path, camera: str, size: int, hours: float, dropped: Counter[str]) -> None:
        self.folder = folder / camera
        self.late = 0
        self._size, self._hours, self._dropped = size, hours, dropped
        self._lock = threading.RLock()
        self._writer: SegmentWriter | None = None
        self._writing: Part | None = None
        self._on_way: dict[int, Part | None] = {}
        self._broken = self._unread_told = False
        self._undeleted: set[Path] = set()
        self._unwritten = 0
        self._gone: dict[str, tuple[int, int, int]] = {}
        self._gone_told = -_DROPPED_EVERY_S
        self._unkept_since, self._keeps = time.monotonic(), True
        self._tended = 0.0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            _tell_if_loose(folder, self.folder)
            self._locked = _lock(self.folder)
            try:
                self.epoch, self._parts = self._begin()
            except OSError:
                os.close(self._locked)
                raise
        except BlockingIOError:
            raise SpoolError(f"--spool {self.folder}: another veilcam-encode has it") from None
        except OSError as error:
            raise SpoolError(f"--spool {error.filename or self.folder}: can't be used ({_why(error)})") from None
        self._total = sum(part.size for part in self._parts)
        self._bound()
        self._tell_gone()
        self._tell_others()

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
                    self._note_gone(_FULL, 1, frame.capture_time_ns, frame.capture_time_ns)
            self._bound()
            self._tell_gone()

    def keep(self, kept: Sequence[pb.Sequences]) -> None:
        """The server has these frames of this run."""
        with self._lock:
            self._unkept_since = time.monotonic()
            if not self._keeps:
                self._keeps = True
                log.info("spool %s: the server keeps frames again", self.folder)
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
            self._tell_gone()
            if self._keeps and self._on_way and now - self._unkept_since > _UNKEPT_S:
                self._keeps = False
                log.warning(
                    "spool %s: the server takes frames and has kept none for %.0f s (its log says why); they wait here",
                    *(self.folder, now - self._unkept_since),
                )
            due = [part for part in self._parts if part.unflushed and part.pending and now - part.flushed > _FLUSH_S]
            for part in due:
                part.unflushed, part.flushed = False, now
        try:
            for path in [*(part.path for part in due), *([self.folder] if due else [])]:
                with contextlib.suppress(FileNotFoundError):  # through meanwhile
                    _fsync(path)
        except OSError as error:
            with self._lock:
                self._tell_broken(error)

    def close(self) -> None:
        """Leave what is late to the next run."""
        with self._lock:
            self.lose(max(self._on_way, default=0))
            self._end()
            self._tell_gone(at_once=True)
            os.close(self._locked)

    def _is_over(self, part: Part, hello: pb.Hello, sent: bool) -> bool:
        oldest, first = next(iter(part.pending), None), next(iter(self._on_way), None)
        late = oldest is not None and (first is None or oldest < first)
        long = time.monotonic() - part.began > (_PART_S if sent else _LATE_PART_S)
        return long or part.size > min(_PART_BYTES, self._room() // 8) or part.hello != hello or (late and sent)

    def _room(self) -> int:
        """Bytes that the spool can have: as many as it may, or as the disk has for it."""
        with contextlib.suppress(OSError):  # whatever it is, it is told when a frame is written
            disk = os.statvfs(self.folder)
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
            log.info("spool %s: frames are kept again; %d were not", self.folder, self._unwritten)
            self._unwritten = 0
        return True

    def _opened(self, hello: pb.Hello, frame: pb.Frame) -> tuple[Part, SegmentWriter]:
        """The part that is written, or a new one that this frame begins."""
        if self._writing is None or self._writer is None:
            path = self.folder / f"{self.epoch:020d}-{frame.sequence:012d}{SUFFIX}"
            self._writer = SegmentWriter(path, hello)
            self._writing = Part(path, self.epoch, hello=pb.Hello.FromString(hello.SerializeToString()))
            self._parts.append(self._writing)
        return self._writing, self._writer

    def _tell_broken(self, error: OSError) -> None:
        if not self._broken:
            self._broken = True
            log.error("spool %s: %s; the live stream goes on", self.folder, error.strerror or error)

    def _end(self) -> None:
        part, self._writing = self._writing, None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
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
            if not part.sending and part is not self._writing and self._delete(part.path):
                self._drop(part, "spool full", why)
                return True
        return False

    def _note_gone(self, why: str, count: int, first_ns: int, last_ns: int) -> None:
        if count:
            before, since, until = self._gone.get(why, (0, first_ns, last_ns))
            self._gone[why] = before + count, min(since, first_ns), max(until, last_ns)

    def _tell_gone(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not self._gone or not (at_once or now - self._gone_told >= _DROPPED_EVERY_S):
            return
        for why, (count, first_ns, last_ns) in self._gone.items():
            log.warning(
                "spool %s: frames dropped: %d, captured from %s to %s: %s",
                *(self.folder, count, _told_time(first_ns), _told_time(last_ns), why),
            )
        self._gone.clear()
        self._gone_told = now

    def _drop(self, part: Part, reason: str, why: str) -> None:
        for sequence, stored in self._on_way.items():
            if stored is part:
                self._on_way[sequence] = None
                part.pending.remove(sequence, sequence)
        count = part.indexed if part.unread else len(part.pending)
        self._dropped[reason] += count
        self._note_gone(why, count, *part.captured)
        part.pending.clear()
        part.unread = False
        self._delete_if_through(part)

    def _delete_if_through(self, part: Part) -> None:
        if part.pending or part.unread or part is self._writing or part.sending or part not in self._parts:
            return
        if self._delete(part.path):
            self._parts.remove(part)
            self._total -= part.size

    def _delete(self, path: Path) -> bool:
        """Whether it could be; if not, that is told once, and it is tried again."""
        try:
            index_of(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        except OSError as error:
            if not self._undeleted:
                told = (
                    "spool: %s can't be deleted (%s); it is tried again, and after a restart its frames are sent again"
                )
                log.error(told, error.filename, _why(error))
            self._undeleted.add(path)
            return False
        self._undeleted.discard(path)
        return True

    def _found(self, path: Path) -> Part | None:
        """A part that a run before has left; none if there is nothing in it, or this user can't read it."""
        if not os.access(path, os.R_OK, effective_ids=True):
            log.warning("spool: %s can't be read by this user, and stays where it is (%s)", path, _OWN)
            return None
        try:
            return self._read(path)
        except (SegmentUnreadableError, OSError) as error:
            if not self._unread_told:  # it may be the whole disk
                self._unread_told = True
                problem = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
                log.warning("spool: %s; what can't be read for now stays, and is read later", problem)
        unread = Part(path, 0, unread=True, indexed=indexed(path), not_before=time.monotonic() + _READ_AGAIN_S)
        with contextlib.suppress(OSError):
            told = path.stat()
            unread.size, unread.written = _size(path), _written(told.st_mtime)
            unread.captured = (told.st_mtime_ns,) * 2  # nearly
        return unread

    def _read_again(self) -> None:
        """Look at a part again that couldn't be read; one at a time, and nothing waits for it."""
        with self._lock:
            now = time.monotonic()
            unread = next((part for part in self._parts if part.unread and part.not_before <= now), None)
        if unread is None:
            return
        try:
            read = self._read(unread.path)
        except (SegmentUnreadableError, OSError):
            unread.not_before = time.monotonic() + _READ_AGAIN_S
            return
        with self._lock:
            if unread in self._parts:  # not dropped meanwhile
                place = self._parts.index(unread)
                self._parts[place : place + 1] = [read] if read else []
                self._total += (read.size if read else 0) - unread.size

    def _read(self, path: Path) -> Part | None:
        """A part that a run before has left; none if there is nothing in it, which is told and deleted.

        Raises:
            SegmentUnreadableError, OSError: it can't be read.
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
            self._dropped["spool damaged"] += lost
            self._delete(path)
            return None
        if not entries or not segment.hello.epoch:
            self._delete(path)
            return None
        pending = Ranges()
        for entry in entries:
            pending.add(entry.sequence)
        captured = entries[0].capture_time_ns, entries[-1].capture_time_ns
        written, size = _written(path.stat().st_mtime), _size(path)
        return Part(path, segment.hello.epoch, pending, entries[-1].sequence, captured, written=written, size=size)

    def _begin(self) -> tuple[int, list[Part]]:
        """The number of this run, and the parts that those before have left.

        That number is milliseconds since 1970, or more if a run before had more: a clock can go back.
        """
        before = self._epoch_before()
        self._write_epoch(before)  # or nothing is looked at, and nothing deleted
        parts = [part for path in sorted(self.folder.glob(f"*{SUFFIX}")) if (part := self._found(path))]
        epoch = max(time.time_ns() // 1_000_000, before + 1, *(part.epoch + 1 for part in parts), 0)
        self._write_epoch(epoch)
        return epoch, parts

    def _epoch_before(self) -> int:
        """The number of the run before, 0 for none."""
        file = self.folder / "epoch"
        try:
            return int(file.read_text())
        except FileNotFoundError:
            pass
        except ValueError:
            log.warning("spool: %s holds no number; the clock alone numbers this run", file)
        return 0

    def _write_epoch(self, epoch: int) -> None:
        file = self.folder / "epoch"
        written = file.with_suffix(".new")
        with os.fdopen(os.open(written, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as opened:
            opened.write(f"{epoch}\n")
            opened.flush()
            os.fsync(opened.fileno())
        written.replace(file)
        _fsync(self.folder)

    def _tell_others(self) -> None:
        """One line for each camera whose frames wait beside these and which doesn't run: this one's former name?"""
        with contextlib.suppress(PermissionError):  # other users' spools, in a folder that isn't to be looked into
            for other in sorted(self.folder.parent.iterdir()):
                if other != self.folder and (size := _unsent(other)):
                    log.warning(
                        "spool %s: %.1f MB of camera %s wait there, and only veilcam-encode --name %s sends them: it "
                        "doesn't run now",
                        *(other, size / 1e6, other.name, other.name),
                    )


def _unsent(folder: Path) -> int:
    """Bytes of parts in the spool of another camera; 0 while that runs, or if it isn't this user's."""
    try:
        if (folder / "lock").exists():
            os.close(_lock(folder, wait_s=0.0))
            return sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
    except OSError:
        pass  # it runs, or it is another user's, who is told
    return 0


def _size(path: Path) -> int:
    """Bytes of a part and its index."""
    return sum(each.stat().st_size for each in (path, index_of(path)) if each.exists())


def _written(modified_s: float) -> float:
    """When a part was, by the monotonic clock.

    Both times are by a clock that may have been set meanwhile: how old it is isn't known if one of them is absurd.
    """
    age = time.time() - modified_s if modified_s > CLOCK_SET else 0.0
    return time.monotonic() - max(0.0, age)


def _tell_if_loose(folder: Path, camera: Path) -> None:
    """One line each if others may put something else in the place of a camera's spool, or look into it."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o022 and not mode & stat.S_ISVTX:
        log.warning(
            "spool %s: others may write into it (mode %o); if they shouldn't: chmod 700 %s", folder, mode, folder
        )
    if (mode := stat.S_IMODE(camera.stat().st_mode)) & 0o077:
        log.warning(
            "spool %s: others may look into it (mode %o); if they shouldn't: chmod 700 %s", camera, mode, camera
        )


def _told_time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9).astimezone().isoformat(" ", "seconds")


_FULL, _DISK_FULL = "no more fits into --spool-size", "the disk is full"
_OWN = "give it to the user that runs veilcam-encode, with chown"


def _why(error: OSError) -> str:
    denied = error.errno in (errno.EACCES, errno.EPERM)
    return f"{error.strerror}; {_OWN}" if denied else error.strerror or str(error)


def _lock(folder: Path, wait_s: float = _LOCK_WAIT_S) -> int:
    """A descriptor that holds a spool's lock until it is closed.

    Raises:
        BlockingIOError: another process has it, also after a while.
    """
    deadline = time.monotonic() + wait_s
    locked = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    while True:
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(locked)
                raise
            time.sleep(_LOCK_WAIT_S / 20)
        else:
            return locked


def _fsync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
