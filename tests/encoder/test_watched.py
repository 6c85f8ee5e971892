import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from encoder.backoff import Backoff
from encoder.sources import SourceError, open_source, source_class
from encoder.sources.watched import WatchedSource
from tests.conftest import Service
from tests.encoder.test_cli import ENCODE
from tests.encoder.test_link import lines, received
from tests.waiting import wait_for

HANG, END = "hang", "end"


def jpeg(value: int, size: tuple[int, int] = (48, 64)) -> bytes:
    return cv2.imencode(".jpg", np.full(size, value, np.uint8))[1].tobytes()


class Camera:
    """A network camera: MJPEG by HTTP. Each connection takes the next step of its script, the last one for ever.

    A step is how many frames it gives, and then whether it hangs or ends; (0, HANG) accepts and never answers.

    Args:
        size: of its first connection's frames.
        then: of those of all others.
    """

    def __init__(
        self, *script: tuple[int, str], size: tuple[int, int] = (48, 64), then: tuple[int, int] = (48, 64)
    ) -> None:
        self.script, self.size, self.then = list(script), size, then
        self.hangs = threading.Event()
        self.connections = 0
        self.over = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/video.mjpeg"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self._server.close()

    def _accept(self) -> None:
        while not self.over.is_set():
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            threading.Thread(
                target=self._serve,
                args=(connection, self.then if self.connections > 1 else self.size, *step),
                daemon=True,
            ).start()

    def _serve(self, connection: socket.socket, size: tuple[int, int], frames: int, then: str) -> None:
        with connection:
            try:
                if frames:
                    connection.recv(4096)
                    connection.sendall(
                        b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
                    )
                for index in range(frames):
                    picture = jpeg(index % 200, size)
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                    connection.sendall(head.encode() + picture + b"\r\n")
                    if self.over.wait(0.03):
                        return
                if then == HANG:
                    self.hangs.set()
                    self.over.wait()
            except OSError:
                return


StartCamera = Callable[..., Camera]


@pytest.fixture
def start_camera() -> Iterator[StartCamera]:
    cameras: list[Camera] = []

    def start(*script: tuple[int, str], then: tuple[int, int] = (48, 64)) -> Camera:
        cameras.append(Camera(*script, then=then))
        return cameras[-1]

    yield start
    for camera in cameras:
        camera.close()


def readers(encoder: int) -> list[int]:
    """The processes that read a source for an encoder."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(encoder)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("then", [HANG, END])
def test_a_camera_that_hangs_or_ends_is_opened_again(
    then: str, start_camera: StartCamera, caplog: pytest.LogCaptureFixture
) -> None:
    camera = start_camera((30, then), (10_000, HANG))
    caplog.set_level(logging.INFO)
    source = WatchedSource(camera.url, silence_s=1.0)
    frames = source.frames()
    seen = [next(frames) for _ in range(60)]
    source.close()
    assert list(frames) == []
    assert all(frame.luma.shape == (48, 64) for frame in seen)
    assert camera.connections >= 2
    why = "no frame for 1 s" if then == HANG else "the stream ended"
    told = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert f"{why}; opening it again" in told[0][1]
    assert "gives frames again after" in told[1][1]
    assert source.outages == 1
    assert source.seconds_away > 0


def test_a_camera_that_accepts_and_never_answers(start_camera: StartCamera, caplog: pytest.LogCaptureFixture) -> None:
    camera = start_camera((0, HANG), (0, HANG), (10_000, HANG))
    source = WatchedSource(camera.url, silence_s=1.0, opening_s=3.0)
    next(source.frames())
    source.close()
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 1
    assert "doesn't open within 3 s" in told[0]


def test_a_named_pipe_whose_writer_stalls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, film = tmp_path / "camera", tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for index in range(400):
        writer.write(np.full((48, 64, 3), index % 250, np.uint8))
    writer.release()
    data, over = film.read_bytes(), threading.Event()
    os.mkfifo(path)

    def write() -> None:
        # A writer whose reader goes is told so, and begins again.
        for share, stall_s in ((0.3, 2.5), *((1.0, 0.0),) * 10):
            if over.is_set():
                return
            with path.open("wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
                for start in range(0, int(len(data) * share), 2000):
                    pipe.write(data[start : start + 2000])
                    time.sleep(0.02)
                time.sleep(stall_s)

    threading.Thread(target=write, daemon=True).start()
    source = WatchedSource(str(path), silence_s=1.0, opening_s=10.0)
    for _ in source.frames():
        if source.outages and not source.away_since:
            break
    over.set()
    source.close()
    assert "no frame for 1 s; opening it again" in caplog.text


def test_a_source_that_is_wrong_from_the_start_is_told() -> None:
    for spec, problem in (("/dev/video77", "no such camera"), ("http:///x", "no host")):
        with pytest.raises(SourceError, match=problem):
            WatchedSource(spec)


def test_what_is_watched(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "camera")
    assert source_class(str(tmp_path / "camera")).live
    assert [source_class(spec).live for spec in ("0", "rtsp://h/x", "http://h/x", "pattern", ".")] == [
        *(True, True, True, False, False)
    ]


def test_a_stop_ends_a_source_that_hangs(start_camera: StartCamera) -> None:
    camera, stop = start_camera((30, HANG)), threading.Event()
    source = WatchedSource(camera.url, silence_s=60.0, stop=stop)
    taken: list[object] = []
    taking = threading.Thread(target=lambda: taken.extend(source.frames()), daemon=True)
    taking.start()
    wait_for(lambda: camera.hangs.is_set() and len(taken) > 20, "its frames")
    stop.set()
    taking.join(5)
    assert not taking.is_alive()
    source.close()
    assert (camera.connections, source.outages) == (1, 0), "it hung, and was not opened again"


@pytest.mark.parametrize("held_s", [0.0, 1000.0])
def test_after_a_source_has_held_tries_begin_quickly_again(
    start_camera: StartCamera, monkeypatch: pytest.MonkeyPatch, held_s: float
) -> None:
    monkeypatch.setattr("encoder.sources.watched.HELD_S", held_s)
    waits: list[float] = []

    def wait(backoff: Backoff) -> float:
        waits.append(backoff._next)
        backoff._next *= 2
        return 0.0

    monkeypatch.setattr(Backoff, "wait", wait)
    camera = start_camera((30, END), (30, END), (30, END), (10_000, HANG))
    source = WatchedSource(camera.url)
    for _ in source.frames():
        if len(waits) == 3:
            break
    source.close()
    assert waits == ([0.5, 0.5, 0.5] if held_s == 0 else [0.5, 1.0, 2.0])


def test_no_process_for_a_moment_is_an_outage_like_others(
    start_camera: StartCamera, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of descriptors and memory there may be again."""
    camera, begin = start_camera((30, END), (10_000, HANG)), subprocess.Popen
    problems = [None, OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "Cannot allocate memory")]

    def scarce(*arguments: Any, **more: Any) -> "subprocess.Popen[bytes]":
        if problems and (problem := problems.pop(0)):
            raise problem
        return begin(*arguments, **more)

    monkeypatch.setattr("encoder.sources.watched.subprocess.Popen", scarce)
    source = WatchedSource(camera.url)
    frames = source.frames()
    assert len([next(frames) for _ in range(40)]) == 40
    source.close()
    assert source.outages == 1
    for why in ("Too many open files", "Cannot allocate memory"):
        assert f"no process to read it can be started ({why})" in caplog.text


def test_a_reader_that_breaks_says_where_and_how() -> None:
    command = [sys.executable, "-m", "encoder.sources.reader"]
    pipe = subprocess.PIPE
    for given in (b"null\n", b"no JSON\n", b""):
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as reader:
            assert reader.stdin is not None
            reader.stdin.write(given)
            reader.stdin.flush() if given else reader.stdin.close()  # closed, it ends by itself
            assert reader.wait(60) == 1
            assert reader.stdout is not None
            assert reader.stdout.read() == b""
            assert reader.stderr is not None
            assert b"Traceback" in reader.stderr.read()


@pytest.mark.parametrize(("how", "told"), [("os._exit(3)", "exit code 3"), ("os.kill(os.getpid(), 11)", "SIGSEGV")])
def test_how_a_reader_ended_is_told(
    how: str, told: str, start_camera: StartCamera, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    camera, begin = start_camera((10_000, HANG)), subprocess.Popen
    broken = [sys.executable, "-c", f"import os, sys; sys.stdin.readline(); {how}"]
    commands = [broken]

    def breaking(command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        return begin(commands.pop() if commands else command, **more)

    monkeypatch.setattr("encoder.sources.watched.subprocess.Popen", breaking)
    source = WatchedSource(camera.url)
    next(source.frames())
    source.close()
    assert f"the process that reads it broke down ({told})" in caplog.text


def test_a_camera_that_ends_and_one_that_sends_nothing_are_told_apart(
    start_camera: StartCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder.sources.url._READ_TIMEOUT_MS", 1000)
    for then, told in ((END, "the stream ended$"), (HANG, "the stream sent nothing for 1 s$")):
        with pytest.raises(SourceError, match=told):
            list(open_source(start_camera((20, then)).url).frames())


def test_a_camera_that_hangs_is_on_the_server_again(service: Service, start_camera: StartCamera) -> None:
    camera = start_camera((40, HANG), (0, HANG), (10_000, HANG))
    arguments = [*ENCODE, camera.url, "--server", service.address, "--silence-seconds", "1"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as encoder:
        try:
            wait_for(lambda: received(service) > 70, "frames after the hang", 60)
            reading = readers(encoder.pid)
            encoder.send_signal(signal.SIGINT)
            _, told = encoder.communicate(timeout=30)
        finally:
            encoder.kill()
    assert encoder.returncode == 0, told
    assert len(lines(told, "WARNING", "no frame for 1 s")) == 1
    assert len(lines(told, "gives frames again after")) == 1
    assert "no frames once" in told.splitlines()[-1]
    assert len(reading) == 1
    wait_for(lambda: not alive(reading[0]), "the end of its reader", 5)


def test_no_reader_outlives_an_encoder_that_is_killed(service: Service, start_camera: StartCamera) -> None:
    camera = start_camera((20, HANG))
    arguments = [*ENCODE, camera.url, "--server", service.address]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as encoder:
        wait_for(lambda: received(service), "frames")
        reading = readers(encoder.pid)
        encoder.kill()
    assert len(reading) == 1
    wait_for(lambda: not alive(reading[0]), "the end of its reader", 5)


def test_a_camera_that_comes_back_with_another_size(service: Service, start_camera: StartCamera) -> None:
    camera = start_camera((30, END), (10_000, HANG), then=(96, 128))
    arguments = [*ENCODE, camera.url, "--server", service.address, "--silence-seconds", "1"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as encoder:
        try:
            wait_for(lambda: received(service), "frames")
            wait_for(lambda: width(service) == 128, "the other size")
            encoder.send_signal(signal.SIGTERM)
            _, told = encoder.communicate(timeout=30)
        finally:
            encoder.kill()
    assert encoder.returncode == 0, told
    assert not lines(told, "ERROR")


def width(service: Service) -> int:
    camera = service.server.cameras.get("camera")
    return camera.stream.hello.width if camera and camera.stream else 0


_HANGS = """
import ctypes, sys
from encoder.sources.pattern import PatternSource
frames = PatternSource.frames
def hanging(self):
    for index, frame in enumerate(frames(self)):
        yield frame
        if index == 10:
            print("hangs", flush=True)
            ctypes.CDLL(None).pause()  # without Python's lock, as a decoder that hangs
PatternSource.frames = hanging
from encoder.cli import main
sys.argv = ["veilcam-encode", "pattern:64x48@50", "--out", sys.argv[1]]
main()
"""


def test_a_file_whose_read_never_returns_does_not_hold_up_the_end(tmp_path: Path) -> None:
    out = tmp_path / "messages"
    command, pipe = [sys.executable, "-c", _HANGS, str(out)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as encoder:
        try:
            assert encoder.stdout is not None
            assert encoder.stdout.readline() == "hangs\n"
            encoder.send_signal(signal.SIGTERM)
            _, told = encoder.communicate(timeout=20)
        finally:
            encoder.kill()
    assert encoder.returncode == 0, told
    assert "captured 11" in told.splitlines()[-1]
