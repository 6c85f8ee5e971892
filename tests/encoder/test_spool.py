"""What the server keeps leaves the spool; what it passes over or a connection loses is late; each frame is counted."""

import errno
import logging
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from encoder.spool import spool as spool_module
from encoder.spool.spool import LEAST_BYTES, Spool
from protos.segment import SegmentWriter
from protos.v1 import veilcam_pb2 as pb
from tests.encoder.spools import HELLO, OTHER, flushes, frames, late, unwritable
from tests.encoder.test_link import lines


def test_what_is_kept_is_deleted_and_what_is_passed_over_or_lost_is_late(tmp_path: Path) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    for frame in frames(4):
        spool.append(HELLO, frame, sent=True)
    assert spool.take() is None
    spool.keep([pb.Sequences(first=1, last=1), pb.Sequences(first=3, last=3)])
    assert spool.waiting == 2  # 2 was passed over, 4 is on the way
    (key,) = frames(1, first=5)
    spool.append(HELLO, key, sent=True)
    assert spool.take() is None
    spool.lose(5)
    part = spool.take()
    assert part is not None
    assert list(part.pending) == [2, 4]
    spool.done(part, 4, {1, 2, 3, 4}, 2)
    assert spool.late == 2
    spool.keep([pb.Sequences(first=5, last=5)])  # told too late, and yet
    spool.close()
    assert not list(tmp_path.glob("camera/*.vcseg"))
    assert not list(tmp_path.glob("camera/*.index"))
    assert not dropped.total()


def test_what_a_server_never_keeps_becomes_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It acknowledges frames, and its disk is full: nothing more is remembered of what is on the way than a while's."""
    monkeypatch.setattr(spool_module, "_MOST_ON_WAY", 5)
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    spool.append(HELLO, frames(1)[0], sent=True)
    spool.append(OTHER, frames(1, first=2)[0], sent=True)
    assert spool.take() is None, "the server may yet keep it"
    for frame in frames(4, first=3):
        spool.append(OTHER, frame, sent=True)
    part = spool.take()
    assert part is not None
    assert list(part.pending) == [1]
    spool.put_back(part)
    spool.close()


def test_what_is_pending_can_be_asked_for_while_the_server_keeps(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "camera", 1 << 26, 1.0, Counter())
    for frame in frames(4000):
        spool.append(pb.Hello(camera="camera", epoch=spool.epoch), frame, sent=False)
    spool.append(OTHER, frames(1, first=4001)[0], sent=False)
    part, kept = spool.take(), threading.Event()
    assert part is not None

    def keep() -> None:
        for sequence in range(1, 4000, 2):
            spool.keep([pb.Sequences(first=sequence, last=sequence)])
            time.sleep(0)
        kept.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threading.Thread(target=keep).start()
        while not kept.is_set():
            pending = spool.pending_of(part)
            assert pending == sorted(set(pending))
    finally:
        sys.setswitchinterval(interval)
    assert spool.pending_of(part) == list(range(2, 4001, 2))
    spool.close()


def test_a_connection_that_is_over_loses_nothing_of_the_next(tmp_path: Path) -> None:
    """As when pictures get another size while the connection of before is still being closed."""
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    for frame in frames(4):
        spool.append(HELLO, frame, sent=True)
    spool.append(OTHER, frames(1, first=5)[0], sent=True)
    spool.append(HELLO, frames(1, first=6)[0], sent=True)
    spool.lose(4)
    part = spool.take()
    assert part is not None
    assert list(part.pending) == [1, 2, 3, 4]
    spool.done(part, 4, {1, 2, 3, 4}, 4)
    assert spool.take() is None, "the fifth is on the way"
    spool.close()


def test_what_was_sent_unwritten_and_is_passed_over_is_lost_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    monkeypatch.setattr(spool_module, "SegmentWriter", unwritable)
    for frame in frames(5):
        spool.append(HELLO, frame, sent=True)
    spool.keep([pb.Sequences(first=2, last=2), pb.Sequences(first=4, last=4)])
    assert dropped == Counter({"lost on the way": 2})
    spool.close()
    assert dropped == Counter({"lost on the way": 3})


def test_a_part_that_is_put_back_waits_and_the_next_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = late(tmp_path, 2, 3)
    first = spool.take()
    assert first is not None
    spool.put_back(first, 60.0)
    second = spool.take()
    assert second is not None
    assert list(second.pending) == [3, 4, 5]
    assert spool.put_off == 2
    spool.put_back(second, 120.0)
    assert spool.take() is None
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert spool.take() is first
    spool.close()


def test_what_waits_is_brought_onto_the_disk_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, flushed = late(tmp_path, 3), flushes(monkeypatch)
    (first, _) = sorted((tmp_path / "camera").glob("*.vcseg"))
    spool.tend()
    assert not flushed, "that would wear out a card"
    later = time.monotonic() + 11
    monkeypatch.setattr(time, "monotonic", lambda: later)
    spool.tend()
    assert {first, tmp_path / "camera"} <= set(flushed)
    flushed.clear()
    later += 11
    spool.tend()
    assert not flushed
    spool.close()


def test_a_part_that_the_disk_does_not_take_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = late(tmp_path, 3, 2)
    first, second, live = sorted((tmp_path / "camera").glob("*.vcseg"))
    failing = {first}
    flushed = flushes(monkeypatch, failing)
    later = time.monotonic() + 11
    monkeypatch.setattr(time, "monotonic", lambda: later)
    spool.tend()
    assert set(flushed) == {second, live, tmp_path / "camera"}
    assert len(lines(caplog.text, "Input/output error; the live stream goes on")) == 1
    spool.close()


class OverQuota(SegmentWriter):
    """Writes, and is told at the end that it was too much."""

    def close(self) -> None:
        super().close()
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_a_part_that_fails_as_it_is_closed_keeps_its_frames_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "SegmentWriter", OverQuota)
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    spool.append(HELLO, frames(1)[0], sent=False)
    spool.append(OTHER, frames(1, first=2)[0], sent=False)
    assert len(lines(caplog.text, "Disk quota exceeded; the live stream goes on")) == 1
    part = spool.take()
    assert part is not None
    assert list(part.pending) == [1]
    spool.put_back(part)
    spool.close()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)  # nobody else has it
    assert spool.waiting == 2
    spool.close()
    assert not +dropped


def test_a_server_that_keeps_nothing_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    for number, frame in enumerate(frames(100), 1):
        spool.append(HELLO, frame, sent=True)
        now += 2
        spool.tend()
        assert len(lines(caplog.text, "has kept none for")) == (1 if number > 30 else 0)
    spool.keep([pb.Sequences(first=1, last=100)])
    assert "keeps frames again" in caplog.text
    now += 1000
    spool.tend()
    assert len(lines(caplog.text, "has kept none for")) == 1, "there was nothing to keep"
    spool.close()


def test_an_error_that_more_room_would_not_mend_drops_nothing_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    spool.append(HELLO, frames(1)[0], sent=False)
    with monkeypatch.context() as broken:
        broken.setattr(spool_module, "SegmentWriter", unwritable)
        for number in range(2, 12):
            spool.append(OTHER, frames(1, first=number)[0], sent=False)
    assert (spool.waiting, dropped) == (1, Counter({"spool unwritable": 10}))
    spool.close()
