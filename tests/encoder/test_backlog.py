"""What is late goes out beside what is live: never before it, at its rate, and what hinders it is said once."""

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from encoder import backlog as backlog_module
from encoder import sinks
from encoder.backlog import Backlog
from encoder.backoff import Backoff
from encoder.sampling import Operator
from encoder.spool import spool as spool_module
from encoder.spool.spool import LEAST_BYTES, Spool
from protos.segment import key_of
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasServicer, add_CamerasServicer_to_server
from tests.encoder.spools import HELLO, OTHER, Spooling, failing, flushes, frames, late
from tests.encoder.test_link import endless, lines
from tests.waiting import wait_for


class Server(CamerasServicer):
    """Takes a backlog, or does what it is told to do with a frame; a live stream it never answers after the hello."""

    def __init__(self) -> None:
        self.late: list[int] = []
        self.calls = 0
        self.meets: Callable[[pb.Frame, grpc.ServicerContext], object] = lambda _frame, _context: None
        self.over = threading.Event()

    def Backlog(
        self, request_iterator: Iterator[pb.PublishRequest], context: grpc.ServicerContext
    ) -> pb.BacklogResponse:
        self.calls += 1
        next(request_iterator)
        taken = 0
        for request in request_iterator:
            self.meets(request.frame, context)
            taken += request.frame.sequence not in self.late
            self.late.append(request.frame.sequence)
        return pb.BacklogResponse(recorded=taken)

    def Publish(
        self, request_iterator: Iterator[pb.PublishRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PublishResponse]:
        next(request_iterator)
        yield pb.PublishResponse(accepted=pb.Accepted(max_payload_bytes=1 << 20))
        for _ in request_iterator:
            pass
        self.over.wait(30)


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    servicer, serving = Server(), grpc.server(ThreadPoolExecutor(8))
    add_CamerasServicer_to_server(servicer, serving)
    port = serving.add_insecure_port("127.0.0.1:0")
    serving.start()
    yield servicer, f"127.0.0.1:{port}"
    servicer.over.set()
    serving.stop(0).wait()


def test_what_is_live_goes_first(server: tuple[Server, str], tmp_path: Path) -> None:
    """The live stream has room for a look and four frames, and then none until it has again."""
    taking, address = server
    spool, looks, room = late(tmp_path, 20), 0, threading.Event()

    def flows() -> bool:
        nonlocal looks
        looks += 1
        return looks <= 5 or room.is_set()

    with closing(spool), closing(Backlog(address, None, spool, 1e6, flows)):
        wait_for(lambda: looks > 15, "it looks for room again and again")
        wait_for(lambda: len(taking.late) == 4, "what there was room for")
        assert (taking.late, spool.late) == ([1, 2, 3, 4], 0)
        room.set()
        wait_for(lambda: spool.late == 20, "the rest")


def test_it_goes_at_its_rate(server: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame in a thousand seconds, after the first, by a clock that is set on."""
    taking, address = server
    monkeypatch.setattr(sinks, "UNANSWERED_S", 1e9)

    class Clock:
        asked, ahead = 0, 0.0

        def monotonic(self) -> float:
            self.asked += 1
            return time.monotonic() + self.ahead

    clock = Clock()
    monkeypatch.setattr(backlog_module, "time", clock)
    spool = late(tmp_path, 20)
    with closing(spool), closing(Backlog(address, None, spool, 0.001, lambda: True)):
        for number in (2, 3, 4):
            wait_for(lambda least=number: len(taking.late) >= least, "a frame")  # type: ignore[misc]
            asked = clock.asked
            wait_for(lambda least=asked + 100: clock.asked > least, "it waits")  # type: ignore[misc]
            assert len(taking.late) == number
            clock.ahead += 1000


def test_it_looks_for_room_no_more_than_is_of_use(server: tuple[Server, str], tmp_path: Path) -> None:
    """Its next frame is long due, and the live stream has no room."""
    taking, address = server
    spool, looks = late(tmp_path, 20), 0

    def flows() -> bool:
        nonlocal looks
        looks += 1
        return looks <= 3

    with closing(spool), closing(Backlog(address, None, spool, 1e6, flows)):
        wait_for(lambda: len(taking.late) == 2, "what there was room for")
        before, began = looks, time.monotonic()
        wait_for(lambda: looks >= before + 30, "it looks again and again")
        assert (looks - before) / (time.monotonic() - began) < 300, "looks a second"


@pytest.mark.parametrize("counts", [[1] * 50, [50]])
def test_the_spool_is_tended_while_much_is_sent(
    counts: list[int], server: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many parts, or one that takes long: what comes meanwhile is brought onto the disk itself."""
    monkeypatch.setattr(spool_module, "_TEND_EVERY_S", 0.1)
    monkeypatch.setattr(spool_module, "_FLUSH_S", 0.1)
    taking, address = server
    spool, flushed = late(tmp_path, *counts), flushes(monkeypatch)
    with closing(spool), closing(Backlog(address, None, spool, 5.0, lambda: True)):
        wait_for(lambda: taking.late, "the first frame")
        spool.append(OTHER, frames(1, first=100)[0], sent=False)
        wait_for(lambda: any(path.name.endswith("-000000000100.vcseg") for path in flushed), "a new part on disk", 5)
        assert spool.waiting > 10, "it is far from through"


def test_a_server_that_never_answers_is_told_once(
    server: tuple[Server, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking, address = server
    monkeypatch.setattr(sinks, "UNANSWERED_S", 0.3)
    monkeypatch.setattr(backlog_module, "REFUSED_WAIT_S", 0.5)
    taking.meets = lambda _frame, context: taking.over.wait(0 if not context.is_active() else 30)
    spool = late(tmp_path, 4)
    with closing(spool), closing(Backlog(address, None, spool, 1e6, lambda: True)):
        wait_for(lambda: taking.calls >= 3, "it is tried again")
        taking.meets = lambda _frame, _context: None
        taking.over.set()
        wait_for(lambda: spool.waiting == 1, "it takes them at last")
    assert len(lines(caplog.text, "the server has answered nothing for")) == 1


@pytest.mark.parametrize(("count", "every", "frame_s"), [(120, 4, 0.02), (8, 8, 0.08)])
def test_a_backlog_gets_through_to_a_server_that_takes_few_frames(
    count: int, every: int, frame_s: float, tmp_path: Path, server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one with a limit does: all that is sent at once takes longer than it may be silent; in the second case even
    one frame does, with those that it is built on."""
    taking, address = server
    monkeypatch.setattr(sinks, "UNANSWERED_S", 0.4)
    monkeypatch.setattr(backlog_module, "REFUSED_WAIT_S", 0.1)
    monkeypatch.setattr(backlog_module, "Backoff", partial(Backoff, cap=0.1))

    def slowly(_frame: pb.Frame, context: grpc.ServicerContext) -> None:
        if context.is_active():
            time.sleep(frame_s)

    taking.meets = slowly
    spool, dropped = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter()), Counter[str]()
    for frame in frames(count, every=every):
        spool.append(HELLO, frame, sent=False)
    spool.close()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    with closing(spool), closing(Backlog(address, None, spool, 1e6, lambda: True)):
        wait_for(lambda: not spool.waiting, "all of it", 30)
    assert set(taking.late) == set(range(1, count + 1))
    assert not dropped
    assert not list((tmp_path / "camera").glob("*.vcseg"))


def test_a_call_ends_before_a_key_frame_and_none_is_sent_twice(server: tuple[Server, str], tmp_path: Path) -> None:
    spool = late(tmp_path, 600)
    with closing(spool), closing(Backlog(server[1], None, spool, 1e6, lambda: True)):
        wait_for(lambda: spool.late == 600, "all of it")
    assert server[0].late == list(range(1, 601))
    assert server[0].calls > 1


def test_a_part_on_which_the_server_hangs_does_not_hold_up_newer_ones(
    server: tuple[Server, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sinks, "UNANSWERED_S", 0.3)
    taking, address = server
    taking.meets = lambda frame, _context: frame.sequence <= 3 and taking.over.wait(30)
    spool = late(tmp_path, 3, 5)
    with closing(spool), closing(Backlog(address, None, spool, 1e6, lambda: True)):
        wait_for(lambda: spool.late == 5, "the newer part")
        wait_for(lambda: "5 frames sent late; 3 that it refused wait" in caplog.text, "a line")
        taking.over.set()


def test_it_is_not_through_while_a_part_waits_that_was_refused(
    server: tuple[Server, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(backlog_module, "REFUSED_WAIT_S", 1.0)
    taking, address = server
    mended = threading.Event()

    def meets(frame: pb.Frame, context: grpc.ServicerContext) -> None:
        if frame.sequence <= 3 and not mended.is_set():
            context.abort(grpc.StatusCode.INTERNAL, "as it happens")

    taking.meets = meets
    spool = late(tmp_path, 3, 5)
    with closing(spool), closing(Backlog(address, None, spool, 1e6, lambda: True)):
        wait_for(lambda: "frames sent late" in caplog.text, "a line")
        assert lines(caplog.text, "5 frames sent late; 3 that it refused wait")
        assert "is through" not in caplog.text
        mended.set()
        wait_for(lambda: "the backlog is through: 3 frames sent late" in caplog.text, "the rest")


def test_what_nobody_thought_of_ends_no_backlog(
    server: tuple[Server, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "REFUSED_WAIT_S", 0.2)
    spool, times = late(tmp_path, 3), iter(range(2))
    whole = key_of

    def broken(*told: object) -> int | None:
        if next(times, None) is not None:
            raise MemoryError
        return whole(*told)  # type: ignore[arg-type]

    monkeypatch.setattr(backlog_module, "key_of", broken)
    with closing(spool), closing(Backlog(server[1], None, spool, 1e6, lambda: True)):
        wait_for(lambda: spool.late == 3, "it goes on")
    assert len(lines(caplog.text, "MemoryError()")) == 1


def test_a_part_that_the_system_cannot_open_for_now_is_sent_later(
    server: tuple[Server, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "REFUSED_WAIT_S", 0.2)
    spool, opened, times = late(tmp_path, 3), Path.open, iter(range(2))

    def few(path: Path, *told: Any, **named: Any) -> object:
        if path.suffix == ".vcseg" and next(times, None) is not None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *told, **named)

    monkeypatch.setattr(Path, "open", few)
    with closing(spool), closing(Backlog(server[1], None, spool, 1e6, lambda: True)):
        wait_for(lambda: spool.late == 3, "all of it")
    assert len(lines(caplog.text, "Too many open files")) == 1


def test_a_part_whose_first_read_fails_stays_and_is_sent_later(
    server: tuple[Server, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "REFUSED_WAIT_S", 0.2)
    spool = late(tmp_path, 3)
    (part, _) = sorted((tmp_path / "camera").glob("*.vcseg"))
    kept = failing(part)
    with closing(spool), closing(Backlog(server[1], None, spool, 1e6, lambda: True)):
        wait_for(lambda: "can't be read for now" in caplog.text, "a line")
        wait_for(lambda: spool.put_off == 3, "it waits")
        kept.replace(part)
        wait_for(lambda: spool.late == 3, "all of it")
    assert len(lines(caplog.text, "it can't be read for now")) == 1


def test_frames_that_a_mute_server_does_not_take_are_late(
    server: tuple[Server, str], operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "CLOSE_TIMEOUT_S", 0.2)
    running = Spooling(operator, server[1], tmp_path, endless(30))
    try:
        wait_for(lambda: running.spool.waiting > 3 * sinks.UNACKNOWLEDGED_FRAMES, "frames that wait", 10)
    finally:
        running.end()  # the server is mute to the end, and so has refused nothing
    account = running.account
    assert account.dropped.total() < sinks.UNACKNOWLEDGED_FRAMES + 50, "those of a second or two"
