"""A spool is bounded in size and age, on a full disk too; what it drops for that is counted and told."""

import errno
import os
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest

from encoder.spool.spool import LEAST_BYTES, Spool
from protos.segment import Segment, index_of
from protos.v1 import veilcam_pb2 as pb
from tests.encoder.spools import HELLO, OTHER, frames, late, number, small_disk
from tests.encoder.test_link import lines


def test_a_spool_is_bounded_and_drops_the_oldest(tmp_path: Path) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    for frame in frames(600, size=10_000):
        spool.append(HELLO, frame, sent=False)
        taken = sum(path.stat().st_size for path in (tmp_path / "camera").iterdir())
        assert taken <= LEAST_BYTES + 64
    assert dropped["spool full"] > 400
    assert dropped.total() == dropped["spool full"]
    assert spool.waiting + dropped["spool full"] == 600
    part = spool.take()
    assert part is not None
    assert min(part.pending) == dropped["spool full"] + 1
    assert taken > LEAST_BYTES / 2
    spool.close()


def test_a_group_larger_than_the_spool_is_dropped_and_the_next_key_frame_begins_anew(tmp_path: Path) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    needs = []
    for frame in frames(200, size=10_000, every=150):
        spool.append(HELLO, frame, sent=False)
        needs += [frame.sequence] if spool.needs_key else []
    assert 90 < needs[0] < 110
    assert needs == list(range(needs[0], 151))
    assert spool.waiting == 50
    assert dropped["spool full"] == 150
    spool.close()


def test_parts_that_cannot_be_read_are_bounded_too(tmp_path: Path) -> None:
    """Their frames are counted by the index, which can be read."""
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    for frame in frames(80, size=10_000):
        spool.append(HELLO, frame, sent=False)
    spool.close()
    for part in (tmp_path / "camera").glob("*.vcseg"):
        part.unlink()
        part.symlink_to("/proc/self/mem")
        os.truncate(index_of(part), 8 + 4 * 24)
    parts, dropped = len(list((tmp_path / "camera").glob("*.vcseg"))), Counter[str]()
    assert parts > 1
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    spool._size = 0
    for frame in frames(1, first=81):
        spool.append(HELLO, frame, sent=False)
    assert dropped["spool full"] == parts * 4 + 1
    spool.close()


def test_a_file_that_cannot_be_deleted_does_not_lift_the_bound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, unlink = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter()), Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith("-000000000001.vcseg"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    for frame in frames(600, size=10_000):
        spool.append(HELLO, frame, sent=False)
        assert sum(path.stat().st_size for path in (tmp_path / "camera").iterdir()) <= LEAST_BYTES + 64
    part = spool.take()
    assert part is not None
    assert spool.pending_of(part)[0] == 1, "its frames may yet be sent"
    assert len(lines(caplog.text, "can't be deleted (Operation not permitted")) == 1
    spool.close()


def test_what_cannot_be_deleted_is_told_counted_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = late(tmp_path, 300)
    size = spool._total
    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", refused)
        part = spool.take()
        assert part is not None
        spool.done(part, 300, set(part.pending), 300)
        assert spool._total == size, "it takes room"
        assert spool.take() is None
        assert len(lines(caplog.text, "can't be deleted (Read-only file system)")) == 1
    later = time.monotonic() + 2
    monkeypatch.setattr(time, "monotonic", lambda: later)
    spool.tend()
    assert spool._total < size
    assert not part.path.exists()
    spool.close()


def refused(path: Path, missing_ok: bool = False) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def test_what_is_too_old_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    spool.append(HELLO, frames(1)[0], sent=False)
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    spool.append(OTHER, frames(1, first=2)[0], sent=False)
    spool.tend()
    assert (spool.waiting, dropped) == (1, Counter({"spool old": 1}))
    spool.close()


def test_a_clock_that_is_set_makes_nothing_old(tmp_path: Path) -> None:
    """Not what a camera without a battery saw in 1970, in this run or in the one before."""
    dropped: Counter[str] = Counter()
    for runs in (1, 2):
        spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
        hello = pb.Hello(camera="camera", epoch=spool.epoch)
        (frame,) = frames(1)
        frame.capture_time_ns = 5_000_000_000
        spool.append(hello, frame, sent=False)
        spool.append(pb.Hello(camera="camera", epoch=spool.epoch, width=1), frames(1, first=2)[0], sent=False)
        spool.tend()
        assert spool.waiting == 2 * runs
        spool.close()
        for path in (tmp_path / "camera").glob("*.vcseg"):
            os.utime(path, (5, 5))
    assert not +dropped


def test_on_a_full_disk_the_oldest_frames_make_room_a_few_at_a_time_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is away, and the disk has a hundredth of what the spool may take."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    dropped: Counter[str] = Counter()
    made = frames(400, size=10_000)
    for frame in made:
        frame.capture_time_ns = (1_700_000_000 + frame.sequence) * 10**9
    with small_disk(tmp_path / "small", "2m") as small:
        spool, most = Spool(small, "camera", 200 << 20, 1.0, dropped), 0
        for frame in made:
            before = dropped["spool full"]
            spool.append(HELLO, frame, sent=False)
            most = max(most, dropped["spool full"] - before)
        assert dropped == Counter({"spool full": 400 - spool.waiting})
        assert 0 < most <= 32, "an eighth of what fits, and a group"
        assert spool.waiting > 130
        kept = [frame for path in sorted(small.glob("camera/*.vcseg")) for frame, _ in Segment(path).frames()]
        assert kept == made[-spool.waiting :]
        (told,) = lines(caplog.text, "WARNING", f"spool {small}/camera", "the disk is full")
        first = number(told, r"frames dropped: (\d+)")
        assert f"captured from {told_second(1)} to {told_second(first)}" in told
        now += 61
        spool.tend()
        _, told = lines(caplog.text, "WARNING", f"spool {small}/camera", "the disk is full")
        rest = dropped["spool full"] - first
        assert f"frames dropped: {rest}, captured from {told_second(first + 1)} to {told_second(first + rest)}" in told
        spool.close()
    assert "No space left" not in caplog.text


def told_second(sequence: int) -> str:
    return datetime.fromtimestamp(1_700_000_000 + sequence).astimezone().isoformat(" ")


def test_what_a_spool_drops_is_told_at_most_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its size, of its age, and the last at the end."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    for frame in frames(600, size=10_000):
        spool.append(HELLO, frame, sent=False)
    full = "no more fits into --spool-size"
    assert len(lines(caplog.text, full)) == 1
    spool.append(OTHER, frames(1, first=601)[0], sent=False)
    now += 3601
    spool.append(HELLO, frames(1, first=602)[0], sent=False)
    spool.tend()
    assert len(lines(caplog.text, full)) == 2
    assert not lines(caplog.text, "it was older than --spool-hours")
    spool.close()
    assert len(lines(caplog.text, "it was older than --spool-hours")) == 1
    told = [number(line, r"frames dropped: (\d+)") for line in lines(caplog.text, "frames dropped:")]
    assert sum(told) == dropped.total() == 601
