import itertools
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from benchmarks.processes import free_port
from decoder.settings import Settings
from encoder import link as link_module
from encoder import sinks
from encoder.backoff import Backoff
from encoder.link import ServerLink
from encoder.packing import Packer
from encoder.pipeline import Account, run
from encoder.sampling import Operator
from encoder.sinks import ServerSink, SinkError
from encoder.sources import Frame
from protos.segment import Segment
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasServicer, add_CamerasServicer_to_server
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.encoder.test_cli import ENCODE, encode, wait_until_shown
from tests.waiting import wait_for

GREY = np.full((32, 32), 90, np.uint8)


def lines(told: str, *words: str) -> list[str]:
    return [line for line in told.splitlines() if all(word in line for word in words)]


def test_waits_double_up_to_the_cap_and_begin_anew() -> None:
    backoff = Backoff(first=1, cap=10)
    for longest in (1, 2, 4, 8, 10, 10, 10):
        assert longest / 2 <= backoff.wait() <= longest
    backoff.reset()
    assert backoff.wait() <= 1
    assert len({Backoff().wait() for _ in range(20)}) > 1


def test_a_server_that_comes_later_and_one_that_comes_back(start_service: StartService, tmp_path: Path) -> None:
    port = free_port()
    settings = Settings(port=port, http=0, save=tmp_path / "saved")
    arguments = [*ENCODE, "pattern:64x48@30", "--server", f"127.0.0.1:{port}"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as camera:
        try:
            assert camera.stderr is not None
            told = ""
            while "trying again" not in told:
                told += camera.stderr.readline()
            for _ in range(2):
                service = start_service(settings)
                wait_until_shown(service)
                wait_for(lambda here=service: received(here) > 10, "frames")  # type: ignore[misc]
                service.stop()
            camera.send_signal(signal.SIGINT)
            told += camera.communicate(timeout=30)[1]
        finally:
            camera.kill()
    assert camera.returncode == 0, told
    assert len(lines(told, "WARNING", "no decoder service answers", "trying again")) == 1
    assert len(lines(told, "WARNING", "the server went away")) == 2
    assert len(lines(told, "frames flow again after", "since 20")) == 2
    assert not lines(told, "ERROR")
    summary = told.splitlines()[-1]
    assert "server away 3 times" in summary
    assert "server away" in summary.split("dropped here: ")[1].split(";")[0]


def test_a_server_that_is_killed(tmp_path: Path) -> None:
    port = free_port()
    serve = [sys.executable, "-m", "decoder", "--port", str(port), "--http", "0", "--save", str(tmp_path / "saved")]
    arguments = [*ENCODE, "pattern:64x48@30", "--server", f"127.0.0.1:{port}"]

    def saved() -> int:
        return len(list((tmp_path / "saved").glob("camera/*.png")))

    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as camera:
        try:
            for _ in range(2):
                before = saved()
                with subprocess.Popen(serve, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
                    try:
                        wait_for(lambda least=before + 3: saved() > least, "pictures", 60)  # type: ignore[misc]
                    finally:
                        server.kill()
            camera.send_signal(signal.SIGTERM)
            _, told = camera.communicate(timeout=30)
        finally:
            camera.kill()
    assert camera.returncode == 0, told
    assert 1 <= len(lines(told, "frames flow again after")) <= 2  # the first server may have been there at once
    assert not lines(told, "ERROR")


def test_no_frame_of_a_file_is_lost_with_the_server(start_service: StartService, tmp_path: Path) -> None:
    port = free_port()
    settings = Settings(port=port, http=0, record=tmp_path / "recordings")
    arguments = [*ENCODE, "pattern:64x48@50#3000", "--server", f"127.0.0.1:{port}", "--as-fast-as-possible"]
    service = start_service(settings)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as camera:
        try:
            for frames in (20, 40):
                wait_for(lambda least=frames, here=service: received(here) > least, "frames")  # type: ignore[misc]
                service.stop()
                service = start_service(settings)
            _, told = camera.communicate(timeout=120)
        finally:
            camera.kill()
    service.stop()
    assert camera.returncode == 0, told
    assert "captured 3000, sent 3000" in told.splitlines()[-1]
    segments = sorted((tmp_path / "recordings" / "camera").glob("*.vcseg"))
    assert len(segments) == 3
    recorded = [frame.sequence for path in segments for frame, _ in Segment(path).frames()]
    assert recorded == list(range(1, 3001))  # what was sent when the server went is sent again, and written once


def received(service: Service) -> int:
    camera = service.server.cameras.get("camera")
    return camera.tally.received if camera else 0


def test_giving_up_when_told_to() -> None:
    done = encode("pattern:64x48@30#5", "--server", f"127.0.0.1:{free_port()}", "--give-up-seconds", "1")
    assert done.returncode == 1
    assert "no decoder service answers" in done.stderr.splitlines()[-1]


def test_a_source_that_ends_while_the_server_is_away(service: Service) -> None:
    arguments = [*ENCODE, "pattern:64x48@30#90", "--server", service.address]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as camera:
        wait_for(lambda: received(service) > 10, "frames")
        service.stop()
        _, told = camera.communicate(timeout=30)
    assert camera.returncode == 1
    assert "the server is away since 20" in told.splitlines()[-1]
    assert "captured 90" in told.splitlines()[-2]


class Scripted(CamerasServicer):
    """Answers each stream as its script says: refuses with a status, takes so many frames, or is mute."""

    def __init__(self, *script: grpc.StatusCode | int | str) -> None:
        self.script = list(script)
        self.received: list[list[pb.Frame]] = []

    def Backlog(
        self, request_iterator: Iterator[pb.PublishRequest], context: grpc.ServicerContext
    ) -> pb.BacklogResponse:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "server: no backlog in any script")
        raise AssertionError("abort raises")

    def Publish(
        self, request_iterator: Iterator[pb.PublishRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PublishResponse]:
        step = self.script.pop(0) if self.script else 1_000_000
        if isinstance(step, grpc.StatusCode):
            context.abort(step, "hello.camera: as the script says")
        next(request_iterator)
        frames: list[pb.Frame] = []
        self.received.append(frames)
        yield pb.PublishResponse(accepted=pb.Accepted(max_payload_bytes=1 << 20))
        for request in request_iterator:
            frames.append(request.frame)
            if step == "mute":
                continue
            told = pb.Acknowledgement(received=request.frame.sequence, settled=request.frame.sequence)
            yield pb.PublishResponse(acknowledgement=told)
            if len(frames) == step:
                context.abort(grpc.StatusCode.ABORTED, "hello.camera: as the script says")


StartScripted = Callable[..., tuple[Scripted, str]]


@pytest.fixture
def scripted() -> Iterator[StartScripted]:
    servers: list[grpc.Server] = []

    def start(*script: grpc.StatusCode | int | str) -> tuple[Scripted, str]:
        servicer, server = Scripted(*script), grpc.server(ThreadPoolExecutor(8))
        add_CamerasServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return servicer, f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


def endless(rate: float = 100) -> Iterator[Frame]:
    while True:
        yield frame_of(GREY, time.time_ns())
        time.sleep(1 / rate)


class Running:
    """The pipeline into a link, in a thread."""

    def __init__(self, operator: Operator, address: str, frames: Iterator[Frame], resizable: bool = False) -> None:
        self.account, self.stop = Account(), threading.Event()
        self.link = ServerLink(address, hello_of(operator, GREY), self.account.dropped, resizable=resizable)
        arguments = (frames, Packer(operator, 0.1), self.link, self.account, self.stop)
        self.thread = threading.Thread(target=run, args=arguments)
        self.thread.start()

    def end(self) -> None:
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.link.close()


@pytest.mark.parametrize("status", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED", "INTERNAL"])
def test_what_may_pass_by_itself_is_tried_again(
    status: str, scripted: StartScripted, operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    code = grpc.StatusCode[status]
    server, address = scripted(code, code, code)
    with caplog.at_level(logging.INFO):
        running = Running(operator, address, endless())
        wait_for(lambda: server.received and len(server.received[0]) > 3, "frames")
        running.end()
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"], caplog.text
    assert "frames flow again" in caplog.text
    assert server.received[0][0].kind == pb.FRAME_KIND_KEY
    assert running.account.dropped["server away"] > 0


@pytest.mark.parametrize("status", ["INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNIMPLEMENTED"])
def test_a_first_refusal_that_only_people_can_remove_ends_it(
    status: str, scripted: StartScripted, operator: Operator
) -> None:
    _, address = scripted(grpc.StatusCode[status])
    link = ServerLink(address, hello_of(operator, GREY), Counter())
    with pytest.raises(SinkError, match=f"the server refused: {status}"):
        wait_for(lambda: link.wait_until_ready(0.2), "an answer")


def test_once_taken_a_refusal_is_tried_again_slowly(
    scripted: StartScripted, operator: Operator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "REFUSED_WAIT_S", 0.7)
    server, address = scripted(5, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.NOT_FOUND)
    began = time.monotonic()
    running = Running(operator, address, endless())
    wait_for(lambda: len(server.received) == 2 and len(server.received[1]) > 3, "frames")
    assert time.monotonic() - began > 1.4
    running.end()
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 2
    assert "ABORTED" in told[0]
    assert "NOT_FOUND" in told[1]
    sequences = [[frame.sequence for frame in frames] for frames in server.received]
    assert len(sequences[0]) == 5
    taken = list(itertools.chain.from_iterable(sequences))
    assert taken == sorted(set(taken))
    assert server.received[1][0].kind == pb.FRAME_KIND_KEY


def test_a_name_that_is_publishing_is_given_the_time_to_be_let_go(
    scripted: StartScripted, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = grpc.StatusCode.ALREADY_EXISTS
    server, address = scripted(taken, taken)
    running = Running(operator, address, endless())
    wait_for(lambda: server.received, "taken")
    running.end()
    monkeypatch.setattr(link_module, "NAME_TAKEN_S", 1.0)
    _, address = scripted(*[taken] * 20)
    link = ServerLink(address, hello_of(operator, GREY), Counter())
    with pytest.raises(SinkError, match=r"ALREADY_EXISTS.*choose another --name"):
        wait_for(lambda: link.wait_until_ready(0.2), "an answer")


def test_a_server_that_acknowledges_nothing_is_left(
    scripted: StartScripted, operator: Operator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "UNANSWERED_S", 1.0)
    server, address = scripted("mute")
    caplog.set_level(logging.INFO)
    running = Running(operator, address, endless())
    wait_for(lambda: len(server.received) == 2 and len(server.received[1]) > 3, "frames")
    running.end()
    assert "the server has acknowledged nothing for 1 s" in caplog.text
    lost = running.account.dropped["lost on the way"]
    assert 1 <= lost <= sinks.UNACKNOWLEDGED_FRAMES
    assert f"lost on the way: {lost}" in caplog.text


def test_as_many_frames_are_on_the_way_however_many_were_left_out_between(
    scripted: StartScripted, operator: Operator
) -> None:
    _, address = scripted("mute")
    sink, packer = ServerSink(address, hello_of(operator, GREY)), Packer(operator, 0.1)
    for number in range(1, sinks.UNACKNOWLEDGED_FRAMES + 1):
        assert sink.wait_until_ready(0)
        sink.send(pb.PublishRequest(frame=packer.pack(frame_of(GREY), 100 * number)[0]))
    assert not sink.wait_until_ready(0)
    sink.drop()


def test_pictures_of_another_size_go_on_a_new_stream(service: Service, operator: Operator) -> None:
    def growing() -> Iterator[Frame]:
        for index in itertools.count():
            yield frame_of(GREY if index < 20 else np.zeros((48, 64), np.uint8), time.time_ns())
            time.sleep(0.05)

    running = Running(operator, service.address, growing(), resizable=True)

    def size() -> tuple[int, int]:
        camera = service.server.cameras.get("camera")
        return (camera.stream.hello.width, camera.stream.hello.height) if camera and camera.stream else (0, 0)

    wait_for(lambda: size() == (32, 32), "the first size")
    wait_for(lambda: size() == (64, 48), "the second size")
    wait_for(lambda: running.account.sent > 30, "frames of it")
    running.end()
    dropped = running.account.dropped
    assert dropped["size changed"] == 1
    assert not dropped["lost on the way"], "what was on the way on the first stream arrived"
    assert not dropped["server away"], "it was there all the time"


def test_an_outage_is_over_when_there_is_a_connection_though_the_source_is_silent(
    scripted: StartScripted, operator: Operator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "HELD_S", 0.3)
    caplog.set_level(logging.INFO)
    server, address = scripted(3)
    running = Running(operator, address, itertools.chain(itertools.islice(endless(), 40), silence()))
    wait_for(lambda: len(server.received) == 2, "the second connection")
    wait_for(lambda: "nothing to send" in caplog.text or "frames flow again" in caplog.text, "a line")
    assert running.link.away_since == ""
    assert running.link.outages == 1
    away = running.link.seconds_away
    time.sleep(0.3)
    assert running.link.seconds_away == away > 0
    running.end()


def silence() -> Iterator[Frame]:
    time.sleep(3)
    yield from endless()


def test_frames_that_were_never_acknowledged_are_told_at_the_end(
    scripted: StartScripted, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "CLOSE_TIMEOUT_S", 0.3)
    _, address = scripted("mute")
    dropped: Counter[str] = Counter()
    link, packer = ServerLink(address, hello_of(operator, GREY), dropped), Packer(operator, 0.1)
    wait_for(lambda: link.wait_until_ready(0.2), "a connection")
    for number in (1, 2):
        link.send(pb.PublishRequest(frame=packer.pack(frame_of(GREY), number)[0]))
    with pytest.raises(SinkError, match="frames that it never acknowledged: 2"):
        link.close()
    assert dropped["lost on the way"] == 2


def test_whatever_breaks_while_it_connects_it_tries_again(
    scripted: StartScripted, operator: Operator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = scripted()
    tries: list[RuntimeError] = [RuntimeError("can't start new thread")]

    def connected(*arguments: Any) -> ServerSink:
        if tries:
            raise tries.pop()
        return ServerSink(*arguments)

    monkeypatch.setattr(link_module, "ServerSink", connected)
    running = Running(operator, address, endless())
    wait_for(lambda: server.received and len(server.received[0]) > 3, "frames")
    running.end()
    assert "can't start new thread" in caplog.text


def test_after_a_connection_that_held_waits_are_short_again(
    scripted: StartScripted, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Noted(Backoff):
        def wait(self) -> float:
            waits.append(super().wait())
            return 0.01

    monkeypatch.setattr(link_module, "HELD_S", 0.0)
    monkeypatch.setattr(link_module, "Backoff", Noted)
    server, address = scripted(3, 3, 3, 3)
    running = Running(operator, address, endless())
    wait_for(lambda: len(server.received) == 5 and server.received[4], "the fifth connection")
    received = max(frame.sequence for frame in server.received[3])
    assert running.link.progress.received >= received, "what was told on connections before"
    running.end()
    assert len(waits) == 4
    assert all(wait <= 0.5 for wait in waits)
