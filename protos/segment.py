"""A segment of a recording, or of a camera's spool: one file, appended to and never changed, of one camera's frames.

All numbers little-endian.

    head     magic "VCSEG" │ u8 version │ u32 length │ u32 CRC-32 │ veilcam.v1.Hello of that length
    record   u32 length │ u32 CRC-32 │ i64 time received, ns since 1970 │ veilcam.v1.Frame of that length
    …        the first frame is a key frame

A record's CRC covers its length, its time and its frame. What follows the last whole record was being written when the
writer was killed, and is left out. Where a record in the middle is damaged, a reader goes on at the next key frame that
the index knows. Sequences count up within a segment. The index lies beside it; rows that it lacks are found in the
segment, and one that doesn't fit, or is of another version, is left aside.

    head     magic "VCINDEX" │ u8 version
    row      i64 capture time, ns since 1970 │ u64 2 × offset of the record, + 1 for a key frame │ u64 sequence
"""

import contextlib
import errno
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from protos.v1 import veilcam_pb2 as pb

VERSION = 1
SUFFIX, INDEX_SUFFIX = ".vcseg", ".index"

_MAGIC = b"VCSEG"
_HEAD = struct.Struct("<5sBII")
_RECORD = struct.Struct("<IIq")
_COVERED = struct.Struct("<Iq")
_INDEX_HEAD = b"VCINDEX\x02"
_ROW = struct.Struct("<qQQ")
_MAX_HELLO = 1 << 12
_MAX_FRAME = 64 << 20
"""Bytes; a length above it is damage, and nothing is allocated for it."""


class SegmentError(ValueError):
    """A file that is no segment; the message names it and what was expected."""


class SegmentVersionError(SegmentError):
    """A segment of a version that this program doesn't read; another may."""


class SegmentUnreadableError(SegmentError):
    """A file that is there, and that the system can't read; that may pass, and says nothing of what is in it."""


@dataclass(frozen=True)
class Entry:
    """Where a frame of a segment is.

    Attributes:
        capture_time_ns: since 1970, by the camera's clock.
        offset: of its record, in bytes from the start of the file.
        key: it needs no other frame.
        sequence: within the camera's run.
    """

    capture_time_ns: int
    offset: int
    key: bool
    sequence: int


class SegmentWriter:
    """Appends frames to a segment of its own. Each record goes out in one write.

    Raises:
        OSError: the file can't be made; then none is left.
    """

    def __init__(self, path: Path, hello: pb.Hello) -> None:
        self.path = path
        self.frames = 0
        self._file: BinaryIO = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb", buffering=0)
        try:
            index = os.open(index_of(path), os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        except OSError:
            self._file.close()
            path.unlink()
            raise
        self._index: BinaryIO = os.fdopen(index, "wb", buffering=0)
        told = hello.SerializeToString()
        try:
            self.size = self._put(self._file, _HEAD.pack(_MAGIC, VERSION, len(told), zlib.crc32(told)) + told)
            self._put(self._index, _INDEX_HEAD)
        except OSError:
            self.close()
            path.unlink()
            index_of(path).unlink()
            raise

    def append(self, frame: pb.Frame, received_ns: int) -> None:
        """Write one frame.

        Raises:
            OSError: the disk is full or gone; what was written of the record is cut off, here or by the next reader.
                The frame can be written again.
        """
        told = frame.SerializeToString()
        covered = _COVERED.pack(len(told), received_ns)
        record = _RECORD.pack(len(told), zlib.crc32(told, zlib.crc32(covered)), received_ns) + told
        key = frame.kind == pb.FRAME_KIND_KEY
        try:
            self._put(self._file, record)
            self._put(self._index, _ROW.pack(frame.capture_time_ns, self.size << 1 | key, frame.sequence))
        except OSError:
            for file, size in ((self._file, self.size), (self._index, self.size_on_disk - self.size)):
                with contextlib.suppress(OSError):
                    file.seek(size)  # what comes next is written there, also if this can't be cut off
                    file.truncate()
            raise
        self.size += len(record)
        self.frames += 1

    @property
    def size_on_disk(self) -> int:
        """Bytes of both files."""
        return self.size + len(_INDEX_HEAD) + self.frames * _ROW.size

    def flush(self) -> None:
        """Bring the frames that were written onto the disk itself; the name of a new file is its folder's."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files.

        Raises:
            OSError: what wasn't flushed may be lost.
        """
        try:
            self._file.close()
        finally:
            self._index.close()

    @staticmethod
    def _put(file: BinaryIO, data: bytes) -> int:
        written = file.write(data)
        if written != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)


class Segment:
    """A segment to read, also one that is being written or whose writer was killed.

    Raises:
        SegmentError: not a segment, or its head is damaged; ``SegmentUnreadableError`` if the system can't read it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.hello, self._first = _read_head(path, file)
        except FileNotFoundError as error:
            raise SegmentError(f"{path}: {error.strerror}") from None
        except OSError as error:
            raise SegmentUnreadableError(f"{path}: {error.strerror}") from None

    def entries(self) -> list[Entry]:
        """Every frame, in order, from the index where it fits and for the rest from the segment itself.

        Raises:
            OSError: it can't be read.
        """
        size = self.path.stat().st_size
        entries = _read_index(index_of(self.path))
        if not entries or entries[0].offset != self._first or entries[-1].offset >= size:
            entries = []
        with self.path.open("rb") as file:
            # The index's last row may be of a record that was never finished, or miss records: the file decides.
            start = entries.pop().offset if entries else self._first
            entries += [entry for entry, _, _ in _records(file, start)]
        return entries

    def frames(self, start: int | None = None) -> Iterator[tuple[pb.Frame, int]]:
        """Whole frames from a record's offset on, with the times they were received.

        After damage the next one is a key frame.

        Raises:
            OSError: it can't be read.
        """
        offset = self._first if start is None else start
        with self.path.open("rb") as file:
            while True:
                for _, frame, received_ns in _records(file, offset):
                    yield frame, received_ns
                stopped, end = file.tell(), os.fstat(file.fileno()).st_size  # it may be deleted meanwhile
                known = _read_index(index_of(self.path))
                later = [entry.offset for entry in known if entry.key and stopped < entry.offset < end]
                if not later:
                    return
                offset = later[0]


def key_of(entries: Sequence[Entry], sequence: int) -> int | None:
    """Offset of the key frame that a frame is built on, by its sequence; None for the first frame."""
    offsets = [entry.offset for entry in entries if entry.key and entry.sequence <= sequence]
    return offsets[-1] if offsets else None


def with_base(frames: Iterable[tuple[pb.Frame, int]], sequence: int = 0) -> Iterator[pb.Frame]:
    """Frames but for those whose base, after damage, isn't the frame before.

    Args:
        sequence: of the frame before the first, if that isn't a key frame.
    """
    for frame, _ in frames:
        if not frame.base_sequence or frame.base_sequence == sequence:
            sequence = frame.sequence
            yield frame


def indexed(path: Path) -> int:
    """How many frames the index of a segment has, readable or not."""
    return len(_read_index(index_of(path)))


def index_of(path: Path) -> Path:
    """Where the index of a segment is."""
    return path.with_suffix(INDEX_SUFFIX)


def last_entry(path: Path) -> Entry | None:
    """A segment's last frame, without reading all where the index is whole; None if it has none.

    Raises:
        SegmentError: not a segment.
        OSError: it can't be read.
    """
    last = None
    try:
        with index_of(path).open("rb") as file:
            rows = (file.seek(0, os.SEEK_END) - len(_INDEX_HEAD)) // _ROW.size
            file.seek(0)
            if rows > 0 and file.read(len(_INDEX_HEAD)) == _INDEX_HEAD:
                file.seek(len(_INDEX_HEAD) + (rows - 1) * _ROW.size)
                last = _entry(*_ROW.unpack(file.read(_ROW.size)))
    except FileNotFoundError:
        pass
    if last is not None and last.offset < path.stat().st_size:
        with path.open("rb") as file:
            after = [entry for entry, _, _ in _records(file, last.offset)]
        if after and after[0] == last:
            return after[-1]
    entries = Segment(path).entries()
    return entries[-1] if entries else None


def _read_head(path: Path, file: BinaryIO) -> tuple[pb.Hello, int]:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise SegmentError(f"{path}: {len(head)} bytes are too few for a segment")
    magic, version, length, crc = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise SegmentError(f"{path}: begins with {magic!r}, a segment with {_MAGIC!r}")
    if version != VERSION:
        raise SegmentVersionError(f"{path}: version {version}, this program reads {VERSION}")
    told = file.read(length) if length <= _MAX_HELLO else b""
    if len(told) != length or zlib.crc32(told) != crc:
        raise SegmentError(f"{path}: its head is damaged")
    try:
        return pb.Hello.FromString(told), _HEAD.size + length
    except DecodeError:
        raise SegmentError(f"{path}: its head is no veilcam.v1.Hello") from None


def _records(file: BinaryIO, start: int) -> Iterator[tuple[Entry, pb.Frame, int]]:
    """Whole records from an offset on; the file then stands where the first that isn't whole begins."""
    offset = start
    while True:
        file.seek(offset)
        head = file.read(_RECORD.size)
        length, crc, received_ns = _RECORD.unpack(head) if len(head) == _RECORD.size else (0, 0, 0)
        told = file.read(length) if 0 < length <= _MAX_FRAME else b""
        whole = told and len(told) == length
        if not whole or zlib.crc32(told, zlib.crc32(_COVERED.pack(length, received_ns))) != crc:
            break
        try:
            frame = pb.Frame.FromString(told)
        except DecodeError:
            break
        yield Entry(frame.capture_time_ns, offset, frame.kind == pb.FRAME_KIND_KEY, frame.sequence), frame, received_ns
        offset += _RECORD.size + length
    file.seek(offset)


def _read_index(path: Path) -> list[Entry]:
    try:
        data = path.read_bytes()
    except OSError:
        return []
    rows = data[len(_INDEX_HEAD) :]
    if not data.startswith(_INDEX_HEAD):
        return []
    entries = [_entry(*row) for row in _ROW.iter_unpack(rows[: len(rows) // _ROW.size * _ROW.size])]
    if any(later.offset <= earlier.offset for earlier, later in pairwise(entries)):
        return []
    return entries


def _entry(time_ns: int, place: int, sequence: int) -> Entry:
    return Entry(time_ns, place >> 1, bool(place & 1), sequence)
