"""Recordings by URL: what is given, what is refused, a disk that hangs, and engines that fail or change."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.fidelity import psnr
from decoder.catalogue import SHIPPED, Catalogue, load_catalogue
from decoder.engines.onnx_runtime import OnnxRuntimeEngine
from decoder.model import Model
from decoder.recordings.playback import Recording, RecordingError, segments_of
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.conftest import Held
from tests.decoder.peers import Camera, known_of, watch
from tests.decoder.test_settings import DECODE, Running
from tests.decoder.test_web import get
from tests.protos.segments import frames, written
from tests.waiting import wait_for


def test_a_recording_by_url(recorded: Path, start_service: StartService, catalogue: Catalogue) -> None:
    service = start_service(Settings(port=0, http=0, record=recorded.parent))
    told = json.loads(get(f"{service.page}/recordings/camera.json")[1])
    assert told == {"segments": [{"start_ms": 1000, "end_ms": 8000}]}
    shots = list(Recording(segments_of(recorded), catalogue, "veiled").shots())
    at, seen = 1000, []
    while at:
        status, body, headers = get(f"{service.page}/recordings/camera.jpg?at={at}")
        assert (status, headers["Content-Type"], headers["X-Time-Ms"]) == (200, "image/jpeg", str(at))
        picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_GRAYSCALE)
        seen.append(np.asarray(picture, np.uint8))
        at = int(headers["X-Next-Ms"] or 0)
    assert all(psnr(picture, shot.pixels) > 30 for picture, shot in zip(seen, shots, strict=True))


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        ("camera.jpg", 400, b"at: ''"),
        ("camera.jpg?at=soon", 400, b"at: 'soon', expected milliseconds"),
        ("camera.jpg?at=-5", 400, b"at: '-5'"),
        ("camera.jpg?at=99999999999999999999", 400, b"at: '9999"),
        ("nobody.jpg?at=5", 404, b"nothing of a camera 'nobody'"),
        ("..%2Fcamera.jpg?at=5", 404, b""),
        ("camera.jpg?at=5&rendition=plain", 403, b"only veiled"),
        ("camera.jpg?at=5&rendition=sharp", 400, b"rendition: expected"),
        ("nobody.json", 200, b'{"segments":[]}'),
    ],
)
def test_a_recording_that_is_not_given(
    asked: str, status: int, told: bytes, recorded: Path, start_service: StartService
) -> None:
    service = start_service(Settings(port=0, http=0, record=recorded.parent))
    code, body, _ = get(f"{service.page}/recordings/{asked}")
    assert code == status
    assert told in body


@pytest.fixture
def stuck(recorded: Path, tmp_path: Path) -> Iterator[Path]:
    """Recordings of two cameras; a pipe in place of the only segment of ``stuck`` keeps whoever opens it."""
    shutil.copytree(recorded, tmp_path / "recordings" / "camera")
    pipe = tmp_path / "recordings" / "stuck" / f"{10**9:020d}.vcseg"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    yield pipe.parent.parent
    let_go(pipe.parent.parent)


def let_go(recordings: Path) -> None:
    """A segment that kept whoever opened it ends, and is gone."""
    for pipe in recordings.glob("stuck/*.vcseg"):
        end = os.open(pipe, os.O_RDWR)
        pipe.unlink()
        os.close(end)


class Askers:
    """Those who ask for something of the page, each on a connection of their own, and haven't got an answer yet."""

    def __init__(self, service: Service) -> None:
        self.address, self.waiting = ("127.0.0.1", service.server.http_port), list[socket.socket]()

    def ask(self, path: str, seconds: float = 0.1) -> list[bytes]:
        """One more asks; what was answered, to whomever, within a while after it."""
        asking = socket.create_connection(self.address)
        asking.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        self.waiting.append(asking)
        return self.answers(seconds)

    def answers(self, seconds: float = 0.0) -> list[bytes]:
        answers = []
        for each in select.select(self.waiting, [], [], seconds)[0]:
            answers.append(each.makefile("rb").read())
            self.go(each)
        return answers

    def go(self, *gone: socket.socket) -> None:
        for each in gone:
            self.waiting.remove(each)
            each.close()


def test_a_disk_that_hangs_holds_up_recordings_alone(
    stuck: Path, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """More ask for what hangs than the server has connections, and are told; those who have gone make room."""
    service = start_service(Settings(port=0, http=0, record=stuck, max_connections=16))
    camera, askers = Camera(service.channel()), Askers(service)
    try:
        for number in range(40):
            for answer in askers.ask("/recordings/camera.json" if number % 2 else "/recordings/stuck.jpg?at=5"):
                assert answer.startswith(b"HTTP/1.1 503")
                assert b"retry-after: 1" in answer
                assert answer.endswith(b"recordings: as many as may wait for the disk are waiting; ask again\n")
        wait_for(lambda: not askers.answers() and len(askers.waiting) == 9, "answers to all but those who may wait")
        camera.say(hello=hello_of(operator, photographs[0], "porch"))
        camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], time.time_ns()), 1)[0])
        camera.settled(1)
        assert get(f"{service.page}/cameras/porch.jpg")[0] == 200
        askers.go(*askers.waiting[4:])
        wait_for(lambda: not askers.ask("/recordings/camera.jpg?at=1000", 1.0), "room for one more who waits")
        assert len(askers.waiting) == 5
        let_go(stuck)
        assert get(f"{service.page}/recordings/camera.jpg?at=1000")[0] == 200
    finally:
        askers.go(*askers.waiting)
    camera.bye()


def test_a_service_whose_disk_hangs_ends_when_it_is_told_to(stuck: Path) -> None:
    arguments = [*DECODE, "--log-json", "--port", "0", "--http", "0", "--engine", "onnxruntime", "--record", str(stuck)]
    (pipe,), held = stuck.glob("stuck/*.vcseg"), list[int]()

    def is_read() -> bool:
        """Whether someone opened it to read, who then waits for what isn't written."""
        try:
            held.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        service = Running(process)
        host, _, port = service.page.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as asking:
            asking.sendall(b"GET /recordings/stuck.jpg?at=5 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(is_read, "the service, which reads it")
            process.send_signal(signal.SIGTERM)
            service.until("stopped")
            try:
                assert process.wait(20) == 0
            finally:
                process.kill()
                os.close(held[0])


def test_a_recording_that_cannot_be_shown_says_why(
    recorded: Path, tmp_path: Path, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(recorded, tmp_path / "camera")
    (tmp_path / "foreign").mkdir()
    written(tmp_path / "foreign" / "1.vcseg", frames(3))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.vcseg").write_bytes(b"not a segment at all")
    catalogue = load_catalogue([SHIPPED], "onnxruntime", 1)
    service = start_service(Settings(port=0, http=0, record=tmp_path), catalogue)
    code, body, _ = get(f"{service.page}/recordings/foreign.jpg?at=5")
    assert (code, b"no reconstructor for operator 0000000000000000 here" in body) == (404, True)
    code, body, _ = get(f"{service.page}/recordings/broken.jpg?at=5")
    assert (code, b"begins with" in body) == (500, True)

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    for each in catalogue.reconstructors:
        monkeypatch.setattr(type(each.engine), "_run", out_of_memory)
    code, body, _ = get(f"{service.page}/recordings/camera.jpg?at=1000")
    assert (code, body) == (503, b"the reconstructor failed, see the server's log\n")


def test_a_rebuilt_engine_is_not_judged_by_what_was_on_its_way_to_the_one_before(
    recorded: Path,
    start_service: StartService,
    monkeypatch: pytest.MonkeyPatch,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
) -> None:
    """A frame is queued for the engine that failed, while that is being rebuilt."""
    catalogue = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    service = start_service(Settings(port=0, http=0, record=recorded.parent), catalogue)
    engines, run, opened = {each.engine for each in catalogue.reconstructors}, OnnxRuntimeEngine._run, threading.Event()
    begun, packer, make = threading.Event(), Packer(operator, 0.1), OnnxRuntimeEngine.__init__

    def failing(engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        if engine in engines:
            raise RuntimeError("device lost")
        return run(engine, measurements)

    def slowly(engine: OnnxRuntimeEngine, name: str, model: Model, threads: int) -> None:
        begun.set()
        assert opened.wait(20)
        make(engine, name, model, threads)

    monkeypatch.setattr(OnnxRuntimeEngine, "_run", failing)
    monkeypatch.setattr(OnnxRuntimeEngine, "__init__", slowly)
    with ThreadPoolExecutor(1) as pool, service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0], "porch"))
        camera.answer()
        porch = known_of(service, "porch")
        (watching,) = watch(channel, porch, "veiled")
        still = pool.submit(get, f"{service.page}/recordings/camera.jpg?at=1000")
        assert begun.wait(20)
        camera.say(frame=packer.pack(frame_of(photographs[0], 1), 1)[0])
        wait_for(lambda: porch.newest is not None and not porch.wanted(), "the frame at the engine")
        opened.set()
        assert still.result(20)[0] == 503
        assert camera.settled(1).shown == 0
        camera.say(frame=packer.pack(frame_of(photographs[1], 2), 2)[0])
        assert camera.shown(2).shown == next(watching).sequence == 2
    camera.bye()


def test_what_an_engine_took_and_the_one_in_its_place_does_not_is_refused(
    recorded: Path, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """A camera that is connected, and a recording."""
    before = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    service = start_service(Settings(port=0, http=0, record=recorded.parent), before)
    after = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    after.reconstructors[0].engine.most_blocks = 20
    problem = "hello.width and hello.height: 448×336, an engine here takes no side of more than 320"
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0], "porch"))
        camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], 1), 1)[0])
        camera.settled(1)
        assert get(f"{service.page}/recordings/camera.jpg?at=1000")[0] == 200
        service.loop.call_soon_threadsafe(service.server.apply, service.server.settings, after)
        assert camera.refusal() == (grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
        assert get(f"{service.page}/recordings/camera.jpg?at=1000")[:2] == (404, f"{problem}\n".encode())
        assert get(f"{service.page}/cameras/porch.jpg")[0] == 404
    with pytest.raises(RecordingError, match=f"vcseg: {problem}"):
        Recording(segments_of(recorded), after, "veiled")


def test_a_recorded_still_that_is_no_longer_allowed_when_the_engine_has_it_ready_is_not_given(
    recorded: Path, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    service = start_service(Settings(port=0, http=0, record=recorded.parent, allow_plain=True))
    with ThreadPoolExecutor(1) as pool:
        still = pool.submit(get, f"{service.page}/recordings/camera.jpg?at=1000&rendition=plain")
        assert held.began.acquire(timeout=20)
        service.loop.call_soon_threadsafe(service.server.apply, Settings(port=0, http=0, record=recorded.parent))
        assert get(f"{service.page}/healthz")[0] == 200
        held.go()
        assert still.result(20)[:2] == (403, b"rendition: plain pictures are no longer given\n")
