import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from encoder.pace import Throttle
from encoder.packing import Packer
from encoder.pipeline import Account, NewestFrame, run
from encoder.sampling import Operator
from encoder.sinks import FileSink, read_messages
from encoder.sources import Frame, SourceError, open_source
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import frame_of

GREY = np.full((32, 32), 90, np.uint8)


def test_the_newest_frame_replaces_one_that_waits_and_that_is_counted() -> None:
    newest = NewestFrame()
    for sequence in (1, 2, 3):
        assert newest.put(sequence, frame_of(GREY))
    taken = newest.take(0)
    assert taken is not None
    assert (taken[0], newest.dropped["newer frame"], newest.take(0)) == (3, 2, None)
    newest.close()
    assert newest.over
    assert not newest.put(4, frame_of(GREY))


def test_a_frame_held_when_it_is_closed_can_still_be_taken() -> None:
    newest = NewestFrame()
    newest.put(1, frame_of(GREY))
    newest.close()
    assert not newest.over
    assert newest.take(0) is not None
    assert newest.over


def test_lossless_holds_the_capture_back_instead_of_dropping() -> None:
    newest = NewestFrame(lossless=True)
    taken: list[int] = []
    feeding = threading.Thread(target=lambda: [newest.put(i, frame_of(GREY)) for i in range(1, 6)])
    feeding.start()
    while len(taken) < 5:
        if found := newest.take(5):
            taken.append(found[0])
    feeding.join()
    assert taken == [1, 2, 3, 4, 5]
    assert not newest.dropped.total()


def test_a_source_goes_into_a_file_whole(operator: Operator, tmp_path: Path) -> None:
    path, account = tmp_path / "messages", Account()
    source = open_source("pattern:48x40@50#9", paced=False)
    sink = FileSink(path, pb.Hello(camera="x", operator_id=operator.id, width=48, height=40))
    run(source.frames(), Packer(operator, 0.1), sink, account, threading.Event(), lossless=True)
    sink.close()
    messages = list(read_messages(path))
    assert messages[0].hello.camera == "x"
    assert [m.frame.sequence for m in messages[1:]] == list(range(1, 10))
    assert (account.captured, account.sent, account.keys >= 1) == (9, 9, True)
    assert account.bytes_sent == sum(len(m.frame.payload) for m in messages[1:])


def test_a_source_that_breaks_or_changes_its_size_is_told(operator: Operator, tmp_path: Path) -> None:
    def breaking() -> Iterator[Frame]:
        yield frame_of(GREY)
        raise SourceError("unplugged")

    def growing() -> Iterator[Frame]:
        yield frame_of(GREY)
        yield frame_of(np.zeros((48, 64), np.uint8))

    def crashing() -> Iterator[Frame]:
        yield frame_of(GREY)
        raise ZeroDivisionError("a bug in a source")

    cases = (
        (breaking(), SourceError, "unplugged"),
        (growing(), SourceError, "from 32×32 to 64×48"),
        (crashing(), ZeroDivisionError, "a bug in a source"),
    )
    for frames, kind, problem in cases:
        sink = FileSink(tmp_path / "messages", pb.Hello())
        with pytest.raises(kind, match=problem):
            run(frames, Packer(operator, 0.1), sink, Account(), threading.Event(), lossless=True)
        sink.close()


def test_stop_ends_an_endless_source(operator: Operator, tmp_path: Path) -> None:
    stop = threading.Event()
    source = open_source("pattern:32x32@100")
    sink = FileSink(tmp_path / "messages", pb.Hello())
    account = Account()
    running = threading.Thread(target=run, args=(source.frames(), Packer(operator, 0.1), sink, account, stop))
    running.start()
    while account.sent < 3:
        time.sleep(0.005)
    stop.set()
    running.join(10)
    sink.close()
    assert not running.is_alive()


def test_a_lower_rate_skips_frames_that_come_too_soon() -> None:
    throttle = Throttle()
    assert throttle.admits(1)
    assert throttle.admits(1)
    throttle.lower(2.0)
    assert not throttle.admits(1)
    time.sleep(0.65)
    assert throttle.admits(1)
    assert not throttle.admits(1)
