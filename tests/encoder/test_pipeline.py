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
from encoder.sinks import FileSink, Progress, read_messages
from encoder.sources import Frame, SourceError, open_source
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import frame_of
from tests.waiting import wait_for

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
    wait_for(lambda: account.sent >= 3, "three frames")
    stop.set()
    running.join(10)
    sink.close()
    assert not running.is_alive()


def test_a_lower_rate_skips_frames_that_come_too_soon() -> None:
    now, sequence = [1000.0], 1
    throttle = Throttle(clock=lambda: now[0])
    assert throttle.admits(1)
    assert throttle.admits(1)
    throttle.lower(2.0)  # 625 ms between frames, of which 5 % are let pass
    for later, admits in ((0.0, False), (0.59, False), (0.01, True), (0.3, False), (0.3, True)):
        now[0] += later
        assert throttle.admits(sequence) is admits, now[0]
    for sequence in range(1000):
        now[0] += 0.2
        throttle.admits(sequence)
    now[0] += 0.01
    assert throttle.admits(1000), "it comes back"


class Scripted:
    """A sink that takes ``most`` frames and then has no room, or is away."""

    name = "scripted"

    def __init__(self, most: int, away: bool = False, lost_after: int = 0) -> None:
        self.sent: list[pb.Frame] = []
        self._most, self._away, self._lost_after = most, away, lost_after

    @property
    def away(self) -> bool:
        return self._away and len(self.sent) >= self._most

    @property
    def progress(self) -> Progress:
        return Progress()

    def wait_until_ready(self, timeout: float) -> bool:
        if len(self.sent) >= self._most:
            time.sleep(0.005)
        return len(self.sent) < self._most

    def take_changes(self) -> set[int]:
        return set()

    def take_lost(self) -> bool:
        lost = 0 < self._lost_after == len(self.sent)
        self._lost_after = 0 if lost else self._lost_after
        return lost

    def send(self, message: pb.PublishRequest) -> bool:
        self.sent.append(message.frame)
        return True

    def resize(self, width: int, height: int) -> bool:
        return True

    def close(self) -> None:
        pass


def filmed(count: int) -> Iterator[Frame]:
    for index in range(count):
        yield frame_of(GREY, 1 + index)


def accounted(account: Account) -> bool:
    return account.captured == account.sent + account.dropped.total()


def test_frames_that_a_server_is_not_there_for_when_the_source_ends_are_counted(operator: Operator) -> None:
    account, sink = Account(), Scripted(0, away=True)
    run(filmed(5), Packer(operator, 0.1), sink, account, threading.Event())
    assert (account.captured, account.sent) == (5, 0)
    assert account.dropped["server away"] >= 1
    assert accounted(account)


def test_frames_at_hand_at_the_stop_are_counted(operator: Operator) -> None:
    """One is held, and one was captured while that is so."""
    account, sink, stop = Account(), Scripted(1), threading.Event()

    def filmed_once_the_first_is_sent() -> Iterator[Frame]:
        yield frame_of(GREY, 1)
        wait_for(lambda: sink.sent, "the first frame")
        yield from filmed(2)
        stop.wait(20)
        yield frame_of(GREY, 1000)

    frames = filmed_once_the_first_is_sent()
    running = threading.Thread(target=run, args=(frames, Packer(operator, 0.1), sink, account, stop))
    running.start()
    wait_for(lambda: account.captured >= 3, "three frames")
    stop.set()
    running.join(20)
    assert account.captured == 4
    assert account.dropped["stopped"] == 2
    assert accounted(account)


def test_a_frame_that_is_sent_again_counts_once_and_its_bytes_twice(operator: Operator) -> None:
    account, sink = Account(), Scripted(100, lost_after=2)
    run(filmed(4), Packer(operator, 0.1), sink, account, threading.Event(), lossless=True)
    assert [frame.sequence for frame in sink.sent] == [1, 2, 2, 3, 4]
    assert (account.sent, account.bytes_sent) == (4, sum(len(frame.payload) for frame in sink.sent))
    assert account.keys == sum(frame.kind == pb.FRAME_KIND_KEY for frame in sink.sent) >= 2
    assert accounted(account)


def test_the_frame_of_another_size_that_ends_a_source_is_counted(operator: Operator, tmp_path: Path) -> None:
    frames = iter([frame_of(GREY), frame_of(np.zeros((48, 64), np.uint8))])
    sink, account = FileSink(tmp_path / "messages", pb.Hello()), Account()
    with pytest.raises(SourceError, match="changed its size"):
        run(frames, Packer(operator, 0.1), sink, account, threading.Event(), lossless=True)
    sink.close()
    assert accounted(account)
