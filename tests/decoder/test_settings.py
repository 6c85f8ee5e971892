"""Settings: file, environment and command line, what is wrong told at once, and changes while the service runs."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import IO

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoder.catalogue import SHIPPED
from decoder.settings import AT_ONCE, Settings, SettingsError, changed, read_settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.peers import Camera
from tests.decoder.test_web import get
from tests.waiting import wait_for

DECODE = [sys.executable, "-m", "decoder"]


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "veilcam.toml"
    file.write_text('port = 1\nhttp = 2\nthreads = 3\nrecord = "there"\nallow_plain = true\n')
    environment = {"VEILCAM_HTTP": "20", "VEILCAM_THREADS": "30", "VEILCAM_RECONSTRUCTOR": "a:b", "HOME": "/x"}
    read = read_settings(file, {"threads": 300, "engine": None}, environment)
    assert (read.port, read.http, read.threads, read.record) == (1, 20, 300, tmp_path / "there")
    assert read.allow_plain
    assert read.reconstructor == (Path("a"), Path("b"))
    assert read.engine == Settings().engine
    assert changed(Settings(), read) == ["port", "http", "reconstructor", "threads", "allow_plain", "record"]


def test_everything_that_is_wrong_is_told_at_once_with_its_place_and_bounds(tmp_path: Path) -> None:
    file = tmp_path / "veilcam.toml"
    file.write_text('port = 99999\nhots = "x"\nreconstructor = ["a", 5]\n')
    with pytest.raises(SettingsError) as error:
        read_settings(file, {"batch": 0}, {"VEILCAM_RECORD_HOURS": "nan", "VEILCAM_PROT": "1"})
    told = str(error.value).splitlines()
    assert f"{file}: port: 99999, expected less than or equal to 65535" in told
    assert f"{file}: reconstructor.1: 5, expected a path" in told
    assert "--batch: 0, expected greater than or equal to 1" in told
    assert "VEILCAM_RECORD_HOURS: 'nan', expected a finite number" in told
    assert f"{file}: hots: no such setting (is host meant?)" in told
    assert any(line.startswith("VEILCAM_PROT: no such setting") for line in told)
    assert len(told) == 6


def test_what_is_empty_is_not_given_in_the_environment_and_refused_elsewhere(tmp_path: Path) -> None:
    """An empty folder would be the working directory, an empty address every address."""
    environment = {f"VEILCAM_{name.upper()}": "" for name in Settings.model_fields}
    assert read_settings(None, {}, environment) == Settings()
    file = tmp_path / "veilcam.toml"
    file.write_text('host = ""\nrecord = ""\n')
    with pytest.raises(SettingsError) as error:
        read_settings(file, {"save": "", "reconstructor": ["a", ""]}, {"VEILCAM_RECONSTRUCTOR": "a"})
    assert str(error.value).splitlines() == [
        f"{where}: '', expected something, or that it is left out"
        for where in (f"{file}: host", "--reconstructor.1", "--save", f"{file}: record")
    ]
    done = subprocess.run([*DECODE, "--check-config", "--record", ""], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "--record: ''" in done.stderr) == (2, True)


def test_the_environment_may_name_the_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "veilcam.toml"
    file.write_text("port = 12345\n")
    environment = {**os.environ, "VEILCAM_CONFIG": str(file), "VEILCAM_HTTP": "54321"}
    arguments = [*DECODE, "--check-config"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert "port = 12345, http = 54321" in done.stderr


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=200) | st.text(alphabet="porthe_scd=\"'[]{}.0123456789-\n ", max_size=80).map(str.encode)
)
def test_any_file_is_settings_or_told(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "veilcam.toml"
    file.write_bytes(data)
    try:
        assert isinstance(read_settings(file, {}, {}), Settings)
    except SettingsError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("port = 0\n", 0, "settings are sound: host = 127.0.0.1, port = 0"),
        ("port = -1\n", 2, "port: -1, expected greater than or equal to 0"),
        ("port = \n", 2, "not TOML"),
        ('engine = "abacus"\n', 2, "engine 'abacus': expected one of"),
        ('reconstructor = ["nowhere.onnx"]\n', 2, "nowhere.onnx: no reconstructor"),
        ('reconstructor = "nowhere.onnx"\n', 2, "expected a list of paths"),
        ("port = 1234\nhttp = 1234\n", 2, "http: 1234, expected a port of its own, and that is the gRPC port"),
        ("port = 8080\n", 2, "http (its default): 8080, expected a port of its own"),
        ("prot = 1\n", 2, "prot: no such setting (is port meant?)"),
        ("xyzzy = 1\n", 2, "xyzzy: no such setting (there are host, port"),
        ('on_change = "no-such-command --with secret"\n', 2, "what is given, expected a command that can be run here"),
        ('trusted_proxy = "here"\n', 2, "expected an IPv4 or IPv6 address"),
        ('threads = "many"\n', 2, "expected a whole number"),
        ('record = "veilcam.toml"\n', 2, "veilcam.toml: can't be written"),
        ('save = "veilcam.toml/below"\n', 2, "veilcam.toml is a file, not a folder"),
        ('record = "new/folder"\n', 0, "settings are sound"),
        ('record = "new"\nrecord_free = 9000000000\n', 2, "all recordings would be deleted"),
    ],
)
def test_check_config(tmp_path: Path, text: str, code: int, told: str) -> None:
    (tmp_path / "veilcam.toml").write_text(text)
    arguments = [*DECODE, "--config", str(tmp_path / "veilcam.toml"), "--check-config"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert " ms" not in done.stderr, "no engine is timed for a check"
    assert "secret" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["veilcam.toml"], "a check makes nothing"


class Running:
    """A service in a process of its own, and what it says."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stderr is not None
        self._lines: IO[str] = process.stderr
        told = self.until("grpc_port")
        self.address, self.page = f"127.0.0.1:{told['grpc_port']}", f"http://127.0.0.1:{told['http_port']}"

    def until(self, part: str) -> dict[str, object]:
        for line in self._lines:
            if part in line:
                found: dict[str, object] = json.loads(line)
                return found
        raise AssertionError(f"it ended and never said {part!r}")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "veilcam.toml"
    path.write_text("port = 0\nhttp = 0\nlog_json = true\n")
    return path


@pytest.fixture
def running(config: Path) -> Iterator[Running]:
    with subprocess.Popen([*DECODE, "--config", str(config)], stderr=subprocess.PIPE, text=True) as process:
        yield Running(process)
        process.terminate()


@pytest.mark.parametrize(("names", "lines"), [(["strong"], 1), (["strong", "plain-r10.onnx"], 0)])
def test_plain_pictures_that_nothing_makes_are_told(names: list[str], lines: int, config: Path) -> None:
    reconstructors = [str(SHIPPED / name) for name in names]
    with config.open("a") as file:
        file.write(f'allow_plain = true\nengine = "onnxruntime"\nreconstructor = {json.dumps(reconstructors)}\n')
    with subprocess.Popen([*DECODE, "--config", str(config)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = list(takewhile(lambda line: "grpc_port" not in line, process.stderr))
        process.terminate()
    assert sum("none of --reconstructor is plain" in line for line in said) == lines
    assert sum("may ask for plain pictures" in line for line in said) == 1


def test_changes_are_taken_up_while_cameras_go_on(running: Running, config: Path, operator: Operator) -> None:
    camera = Camera(grpc.insecure_channel(running.address))
    camera.say(hello=hello_of(operator, np.zeros((48, 64), np.uint8), "porch"))
    camera.answer()
    plain = f"{running.page}/cameras/porch.jpg?rendition=plain"
    assert get(plain)[0] == 403

    before = config.read_text()
    config.write_text(before + "allow_plain = true\nthreads = 0\n")
    told = running.until("settings stay as they were")["message"]
    assert told == f"settings stay as they were: {config}: threads: 0, expected greater than or equal to 1"
    assert get(plain)[0] == 403

    config.write_text(before.replace("port = 0", "port = 50999", 1) + "allow_plain = true\nmax_cameras = 1\n")
    assert running.until("taken up")["message"] == "settings taken up: allow_plain = True, max_cameras = 1"
    assert running.until("next start")["message"] == "settings that wait for the next start: port"
    assert get(f"{running.page}/cameras.json")[0] == 200
    another = Camera(grpc.insecure_channel(running.address))
    another.say(hello=hello_of(operator, np.zeros((48, 64), np.uint8), "yard"))
    assert another.refusal()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED

    camera.say(frame=Packer(operator, 0.1).pack(frame_of(np.zeros((48, 64), np.uint8), time.time_ns()), 1)[0])
    assert camera.settled(1).received == 1
    assert get(plain)[0] == 200
    running.process.send_signal(signal.SIGHUP)
    assert running.until("taken up")["message"] == "settings taken up: none changed"
    assert get(plain)[0] == 200, "reconstructors were opened anew"
    request = pb.WatchRequest(camera="porch", rendition=pb.RENDITION_PLAIN)
    watching = ViewersStub(grpc.insecure_channel(running.address)).Watch(request, timeout=60)
    assert next(watching).rendition == pb.RENDITION_PLAIN
    config.write_text(before)
    running.until("taken up")
    assert get(plain)[0] == 403
    with pytest.raises(grpc.RpcError) as error:
        next(watching)
    assert isinstance(error.value, grpc.Call)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED, "whoever watched plain pictures is let go"
    camera.bye()


HANGING = """
import shutil, time
from pathlib import Path

def disk_usage(path, real=shutil.disk_usage):
    if Path(path, "hang").exists():
        Path(path, "hangs").touch()
        time.sleep(3600)
    return real(path)

shutil.disk_usage = disk_usage
from decoder.cli import main
main()
"""
"""The command, on a machine with a disk that hangs from when it is told to."""


def test_a_disk_that_hangs_when_settings_are_looked_at_stops_nothing(config: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"

    def looked() -> bool:
        config.touch()
        return (disk / "hangs").exists()

    with config.open("a") as file:
        file.write(f'save = "{disk}"\nengine = "onnxruntime"\n')
    arguments = [sys.executable, "-c", HANGING, "--config", str(config)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        try:
            running = Running(process)
            (disk / "hang").touch()
            wait_for(looked, "the look at the disk")
            assert get(f"{running.page}/healthz")[0] == 200
        finally:
            process.kill()


def test_what_waits_for_the_next_start_is_not_in_force(start_service: StartService, operator: Operator) -> None:
    service = start_service(Settings(port=0, http=0))

    async def apply(after: Settings) -> list[str]:
        return service.server.apply(after)

    after = Settings(port=0, http=0, max_payload=2048, max_connections=1, max_pixels=1024)
    for _ in range(2):
        later = asyncio.run_coroutine_threadsafe(apply(after), service.loop).result(20)
        assert later == ["max_payload", "max_connections"], "they still wait"
    assert changed(service.server.settings, after) == later
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, np.zeros((32, 32), np.uint8)))
    assert camera.answer().accepted.max_payload_bytes == Settings().max_payload
    camera.bye()
    large = Camera(service.channel())
    large.say(hello=hello_of(operator, np.zeros((48, 64), np.uint8), "large"))
    assert large.refusal()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert asyncio.run_coroutine_threadsafe(apply(Settings(port=0, http=0)), service.loop).result(20) == []


def test_what_is_taken_up_at_once_are_settings() -> None:
    assert set(AT_ONCE) < set(Settings.model_fields)
