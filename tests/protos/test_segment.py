"""A segment: it reads back, and a kill or damage at any byte costs no more than it must."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.segment import Entry, Segment, SegmentError, SegmentUnreadableError, SegmentWriter, index_of, indexed
from protos.v1 import veilcam_pb2 as pb
from tests.protos.segments import HELLO, frames, read, written


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("whole") / "1.vcseg", frames(20))


def test_what_was_written_reads_back(whole: Path) -> None:
    segment = Segment(whole)
    assert segment.hello == HELLO
    assert [(frame, received) for frame, received in segment.frames()] == [
        (frame, frame.capture_time_ns + 7) for frame in frames(20)
    ]
    entries = segment.entries()
    assert [(entry.capture_time_ns, entry.key) for entry in entries] == [
        (frame.capture_time_ns, frame.kind == pb.FRAME_KIND_KEY) for frame in frames(20)
    ]
    assert next(segment.frames(entries[8].offset))[0] == frames(20)[8]
    assert whole.stat().st_mode & 0o077 == 0


def test_a_frame_that_the_disk_had_no_room_for_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of a frame's two writes, of which half was done."""
    writer, put = SegmentWriter(tmp_path / "1.vcseg", HELLO), SegmentWriter._put
    for number, frame in enumerate(frames(20)):
        room = [True] * (number % 2)

        def full(file: BinaryIO, data: bytes, room: list[bool] = room) -> int:
            return put(file, data) if room and room.pop() else put(file, data[: len(data) // 2]) and refused()

        with monkeypatch.context() as broken:
            broken.setattr(writer, "_put", full)
            with pytest.raises(OSError, match="No space left"):
                writer.append(frame, frame.capture_time_ns)
        assert writer.size_on_disk == writer.path.stat().st_size + index_of(writer.path).stat().st_size
        writer.append(frame, frame.capture_time_ns)
    writer.close()
    assert read(writer.path) == frames(20)
    assert [entry.sequence for entry in Segment(writer.path).entries()] == [frame.sequence for frame in frames(20)]
    assert indexed(writer.path) == 20


def refused() -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@given(data=st.data())
def test_a_kill_at_any_byte_loses_nothing_but_the_tail(
    whole: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut the segment, and its index, at any two bytes: every record that is whole is read, and nothing else."""
    content, index = whole.read_bytes(), index_of(whole).read_bytes()
    entries = Segment(whole).entries()
    cut = data.draw(st.integers(entries[0].offset, len(content)))
    path = tmp_path_factory.mktemp("cut") / "1.vcseg"
    path.write_bytes(content[:cut])
    index_of(path).write_bytes(index[: data.draw(st.integers(0, len(index)))])
    ends = [entry.offset for entry in entries[1:]] + [len(content)]
    expected = sum(end <= cut for end in ends)
    assert read(path) == frames(20)[:expected]
    assert Segment(path).entries() == entries[:expected]


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_byte_costs_no_more_than_the_frames_up_to_the_next_key_frame(
    whole: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(whole.read_bytes())
    entries = Segment(whole).entries()
    place = data.draw(st.integers(entries[0].offset, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "1.vcseg"
    path.write_bytes(content)
    index_of(path).write_bytes(index_of(whole).read_bytes())
    hit = max(number for number, entry in enumerate(entries) if entry.offset <= place)
    following = next((n for n in range(hit + 1, 20) if entries[n].key), 20)
    assert read(path) == frames(20)[:hit] + frames(20)[following:]


@given(content=st.binary(max_size=100))
def test_any_bytes_are_a_segment_or_told(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "1.vcseg"
    path.write_bytes(content)
    with pytest.raises(SegmentError, match=r"1\.vcseg: "):
        Segment(path)


def test_a_file_that_the_system_cannot_read_is_no_damaged_segment(tmp_path: Path) -> None:
    """It opens, and its first read is an EIO."""
    (tmp_path / "1.vcseg").symlink_to("/proc/self/mem")
    with pytest.raises(SegmentUnreadableError, match=r"1\.vcseg: Input/output error"):
        Segment(tmp_path / "1.vcseg")
    with pytest.raises(SegmentError, match=r"2\.vcseg: No such file") as missing:
        Segment(tmp_path / "2.vcseg")
    assert not isinstance(missing.value, SegmentUnreadableError)


@given(rows=st.binary(max_size=200))
def test_an_index_that_does_not_fit_is_left_aside(
    whole: Path, rows: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("index") / "1.vcseg"
    path.write_bytes(whole.read_bytes())
    index_of(path).write_bytes(rows)
    entries: list[Entry] = Segment(path).entries()
    assert entries == Segment(whole).entries()
    assert read(path) == frames(20)


_WRITER = """
import sys
from pathlib import Path
from protos.segment import SegmentWriter
from tests.protos.segments import HELLO, frames
writer = SegmentWriter(Path(sys.argv[1]), HELLO)
for frame in frames(100_000, size=4000):
    writer.append(frame, 1)
    print(frame.sequence, flush=True)
"""


def test_what_a_killed_writer_had_written_is_there(tmp_path: Path) -> None:
    """SIGKILL at random moments, many times: every frame whose writing had returned is read."""
    draw = random.Random(1)
    for attempt in range(8):
        path = tmp_path / f"{attempt}.vcseg"
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(draw.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        told = [1, *(int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n"))]
        process.wait(10)
        process.stdout.close()
        kept = read(path)
        assert len(kept) in (told[-1], told[-1] + 1)
        assert [frame.sequence for frame in kept] == list(range(1, len(kept) + 1))
        assert len(Segment(path).entries()) == len(kept)
