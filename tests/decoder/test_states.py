"""How cameras are, where it is told, and who is called when it changes."""

import json
import logging
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoder.settings import Settings, SettingsError, read_settings
from decoder.states import STATES, Clock
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.peers import Camera, known_of
from tests.decoder.test_door import metric
from tests.decoder.test_web import get
from tests.waiting import wait_for

SMALL = np.zeros((32, 32), np.uint8)
SECOND = 10**9


class Film:
    """A camera and its frames, captured when a test says."""

    def __init__(self, service: Service, operator: Operator, name: str = "porch") -> None:
        self._operator, self._sequence = operator, 0
        self.camera = Camera(service.channel())
        self.camera.say(hello=hello_of(operator, SMALL, name))
        self.camera.answer()

    def send(self, captured_ns: int | None = None) -> None:
        self._sequence += 1
        frame = frame_of(SMALL, time.time_ns() if captured_ns is None else captured_ns)
        self.camera.say(frame=Packer(self._operator, 0.1).pack(frame, self._sequence)[0])
        self.camera.settled(self._sequence)

    def bye(self) -> None:
        self.camera.bye()
        list(self.camera.call)


def told(service: Service) -> dict[str, object]:
    (camera,) = json.loads(get(f"{service.page}/cameras.json")[1])
    return dict(camera)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoder.states.LATE_AFTER_S", 0.3)
    monkeypatch.setattr("decoder.states.SILENT_AFTER_S", 0.9)


@pytest.mark.usefixtures("hurried")
def test_a_camera_goes_through_its_states_and_a_program_is_told_of_each(service: Service, operator: Operator) -> None:
    film = Film(service, operator)
    assert told(service)["state"] == "connecting"
    states = ViewersStub(service.channel()).Cameras(pb.CamerasRequest(), timeout=30)
    began = time.time_ns()
    seen: list[pb.CameraStatus] = [next(states)]
    film.send()
    seen += [next(states), next(states), next(states)]
    assert told(service)["state"] == "silent"
    film.send()
    seen.append(next(states))
    film.bye()
    while seen[-1].state != pb.CAMERA_STATE_GONE:
        seen.append(next(states))
    names = [pb.CameraState.Name(each.state).removeprefix("CAMERA_STATE_").lower() for each in seen]
    assert names in (
        ["connecting", "live", "late", "silent", "live", "gone"],
        ["connecting", "live", "late", "silent", "live", "late", "gone"],  # on a machine that takes its time
    )
    assert {each.camera for each in seen} == {"porch"}
    since = [each.since_ns for each in seen]
    assert since == sorted(since)
    assert began - 30 * SECOND < since[0] <= since[-1] < time.time_ns() + SECOND
    assert [each.HasField("clock_offset_ns") for each in seen[:2]] == [False, True]
    now = told(service)
    assert (now["state"], now["since_ms"]) == ("gone", round(since[-1] / 1e6))
    for state in STATES:
        assert metric(service, "veilcam_camera_state", camera="porch", state=state) == (state == "gone")
    assert metric(service, "veilcam_camera_state_since_seconds", camera="porch") == pytest.approx(since[-1] / 1e9)


def test_frames_that_are_long_on_the_way_are_late_and_those_of_a_replay_never(
    service: Service, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decoder.states._LONGEST_INTERVAL_S", 60.0)

    def slow(name: str, *captured_ns: int) -> list[str]:
        """States after each frame, of a camera that promised one in a while."""
        hello = hello_of(operator, SMALL, name)
        hello.frame_rate = 1 / 60
        camera, packer, found = Camera(service.channel()), Packer(operator, 0.1), []
        camera.say(hello=hello)
        camera.answer()
        for sequence, captured in enumerate(captured_ns, 1):
            camera.say(frame=packer.pack(frame_of(SMALL, captured), sequence)[0])
            camera.settled(sequence)
            known = known_of(service, name)
            found.append(known.state)
        camera.bye()
        return found

    now = time.time_ns()
    assert slow("porch", now, now - 5 * SECOND, time.time_ns()) == ["live", "late", "live"]
    assert slow("yard", now - 3000 * SECOND, now - 3005 * SECOND) == ["live", "live"]


@pytest.mark.parametrize("behind_s", [30, -30])
def test_the_clocks_difference_is_told_beside_latency(service: Service, operator: Operator, behind_s: int) -> None:
    film = Film(service, operator)
    assert told(service)["clock_offset_ms"] is None
    film.send(time.time_ns() - behind_s * SECOND)
    get(f"{service.page}/cameras/porch.jpg")
    now = told(service)
    offset, latency = now["clock_offset_ms"], now["latency_ms"]
    assert isinstance(offset, float)
    assert isinstance(latency, float)
    assert behind_s * 1000 <= offset < behind_s * 1000 + 20_000
    assert latency >= offset, "what is left of it is the server's own, and what the way took more than the quickest"
    assert metric(service, "veilcam_clock_offset_seconds", camera="porch") == pytest.approx(offset / 1e3, abs=1e-3)
    status = next(ViewersStub(service.channel()).Cameras(pb.CamerasRequest(), timeout=20))
    assert status.clock_offset_ns / 1e6 == pytest.approx(offset, abs=0.1)
    film.bye()


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(-(10**12), 10**12)), min_size=1, max_size=60))
def test_a_clocks_offset_is_the_least_difference_of_the_last_minute(frames: list[tuple[float, int]]) -> None:
    clock, now_ns, came = Clock(), 0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decoder.states.time.monotonic_ns", lambda: now_ns)
        patch.setattr("decoder.states.time.time_ns", lambda: now_ns)
        for gap, difference in frames:
            now_ns += int(gap * 10**9)
            clock.tell(now_ns - difference)
            came.append((now_ns // 10**9, difference))
            lately = [each for second, each in came if second >= now_ns // 10**9 - 60]
            assert clock.offset_ns == min(lately)
            assert clock.delay_s == pytest.approx((difference - min(lately)) / 1e9)


def test_who_watches_states_is_let_go_at_the_end(start_service: StartService, operator: Operator) -> None:
    service = start_service()
    film = Film(service, operator)
    states = ViewersStub(service.channel()).Cameras(pb.CamerasRequest(), timeout=30)
    next(states)
    service.stop()
    with pytest.raises(grpc.RpcError) as error:
        list(states)
    assert isinstance(error.value, grpc.Call)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert film.camera.refusal()[0] is grpc.StatusCode.UNAVAILABLE


class Called:
    """A server that keeps what it is told."""

    def __init__(self, status: int = 204, hangs: threading.Event | None = None) -> None:
        self.bodies: list[dict[str, str]] = []
        self.headers: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if hangs is not None:
                    hangs.wait(60)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.bodies.append(json.loads(body))
                outer.headers.append(self.headers["Authorization"])
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.place = f"127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def called() -> Iterator[Callable[..., Called]]:
    made: list[Called] = []

    def make(status: int = 204, hangs: threading.Event | None = None) -> Called:
        made.append(Called(status, hangs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def hooked(start_service: StartService, target: str) -> Service:
    return start_service(Settings.model_validate({"port": 0, "http": 0, "on_change": target}))


def test_a_url_is_told_of_each_change(
    start_service: StartService, operator: Operator, called: Callable[..., Called], caplog: pytest.LogCaptureFixture
) -> None:
    hook = called()
    service = hooked(start_service, f"http://us%40er:sec%3Aret@{hook.place}/T0/token?key=value")
    film = Film(service, operator)
    film.send()
    film.bye()
    wait_for(lambda: [each["state"] for each in hook.bodies] == ["connecting", "live", "gone"], "its three states")
    assert {each["camera"] for each in hook.bodies} == {"porch"}
    assert all(each["since"].startswith("20") and each["since"].endswith("+00:00") for each in hook.bodies)
    assert set(hook.headers) == {"Basic dXNAZXI6c2VjOnJldA=="}
    assert "sec" not in caplog.text


@pytest.mark.parametrize("status", [500, 302, None], ids=["fails", "leads elsewhere", "is not there"])
def test_a_url_that_can_not_be_told_is_a_line_without_its_secrets(
    start_service: StartService, operator: Operator, called: Callable[..., Called], status: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    hook = called(status or 204)
    if status is None:
        hook.close()
    service = hooked(start_service, f"http://user:secret@{hook.place}/T0/token?key=value")
    film = Film(service, operator)
    film.send()
    wait_for(lambda: caplog.text.count("wasn't told") >= 2, "two hooks that failed")
    line = next(record.getMessage() for record in caplog.records if "wasn't told" in record.getMessage())
    problem = f"answered {status}" if status else "can't be reached"
    assert line.startswith(f"on_change http://{hook.place}/…: {problem}")
    assert "camera porch is connecting since 20" in line
    assert not [word for word in ("user", "secret", "token", "key=") if word in caplog.text]
    assert len(hook.bodies) <= 2, "it isn't followed"
    film.bye()


def test_a_url_that_hangs_holds_up_no_camera_and_the_oldest_changes_are_lost(
    start_service: StartService, operator: Operator, called: Callable[..., Called],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("decoder.viewers.hook.WAITING", 3)
    go_on = threading.Event()
    hook = called(hangs=go_on)
    service = hooked(start_service, f"http://{hook.place}/")
    for number in range(3):
        film = Film(service, operator, f"camera{number}")
        film.send()
        film.bye()
    wait_for(lambda: "too slow; camera camera0 is" in caplog.text, "the hook that is too slow")
    go_on.set()
    wait_for(lambda: len(hook.bodies) == 4, "all four changes")
    assert [each["camera"] for each in hook.bodies[1:]] == ["camera2"] * 3
    assert [each["state"] for each in hook.bodies[1:]] == ["connecting", "live", "gone"]


def test_a_command_is_run_at_each_change_and_ended_if_it_hangs(
    start_service: StartService, operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("decoder.viewers.hook.TIMEOUT_S", 3.0)
    caplog.set_level(logging.ERROR, "veilcam.decode")
    program = "import sys, time; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + chr(10)); "
    program += "sys.argv[3] == 'live' and time.sleep(600); sys.exit(sys.argv[3] == 'gone')"
    out = tmp_path / "a file"
    service = hooked(start_service, shlex.join([sys.executable, "-c", program, str(out)]))
    film = Film(service, operator)
    film.send()
    film.bye()
    wait_for(lambda: "ended with 1" in caplog.text, "the command that failed")
    lines = [line.split() for line in out.read_text().splitlines()]
    assert [line[:2] for line in lines] == [["porch", "connecting"], ["porch", "live"], ["porch", "gone"]]
    assert (
        f"on_change {sys.executable}: not through within 3 s, and ended; camera porch is live since 20" in caplog.text
    )


def test_a_command_that_is_not_there_is_told(
    start_service: StartService, operator: Operator, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    command = tmp_path / "command"
    command.touch(mode=0o700)
    service = hooked(start_service, f"{command} --token secret")
    command.unlink()  # what isn't there at the start is refused then
    film = Film(service, operator)
    wait_for(
        lambda: f"on_change {command}: can't be run (No such file or directory)" in caplog.text,
        "the command that can't be run",
    )
    assert "secret" not in caplog.text
    film.bye()


@pytest.mark.parametrize(
    "target",
    [
        "ftp://user:secret@host/",
        "http://",
        "https://:secret@/x",
        "http://host:99999999/secret",
        'say "secret',
        "",
        "  ",
    ],
)
def test_what_can_not_be_called_is_refused_without_telling_it(target: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings(None, {"on_change": target}, {})
    assert str(error.value).startswith("--on-change: ")
    assert "expected" in str(error.value)
    assert "secret" not in str(error.value)


def test_what_is_called_is_not_among_what_is_told_of_settings() -> None:
    settings = read_settings(None, {}, {"VEILCAM_ON_CHANGE": "https://user:secret@host/token"})
    assert settings.on_change is not None
    assert settings.on_change.get_secret_value() == "https://user:secret@host/token"
    assert "secret" not in f"{settings!r} {settings.model_dump(mode='json')}"
