import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from decoder.settings import Settings
from encoder.sinks import read_messages
from tests.conftest import Service, StartService
from tests.encoder.test_sources import FRAMES, drawn, write_pictures, write_video
from tests.waiting import wait_for

ENCODE = [sys.executable, "-m", "encoder"]


def encode(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ENCODE, *arguments], capture_output=True, text=True, timeout=timeout)


def test_into_a_file_with_a_summary(tmp_path: Path) -> None:
    out = tmp_path / "messages"
    done = encode("pattern:64x48@50#5", "--out", str(out), "--as-fast-as-possible", "--name", "porch")
    assert done.returncode == 0, done.stderr
    messages = list(read_messages(out))
    assert (messages[0].hello.camera, len(messages)) == ("porch", 6)
    assert "captured 5, sent 5 (1 key)" in done.stderr


@pytest.fixture
def service(start_service: StartService, tmp_path: Path) -> Service:
    """One that saves pictures, and so watches every camera."""
    return start_service(Settings(port=0, http=0, save=tmp_path / "saved"))


def test_to_a_server_every_frame_when_as_fast_as_possible(service: Service) -> None:
    done = encode("pattern:64x48@50#20", "--server", service.address, "--as-fast-as-possible")
    assert done.returncode == 0, done.stderr
    assert "captured 20, sent 20" in done.stderr
    assert "shown up to 20, unwatched 0, dropped at the server 0" in done.stderr


def test_to_a_server_where_nobody_watches(start_service: StartService) -> None:
    done = encode("pattern:64x48@50#20", "--server", start_service().address, "--as-fast-as-possible")
    assert done.returncode == 0, done.stderr
    assert "acknowledged up to 20, shown up to 0, unwatched 20, dropped at the server 0" in done.stderr


@pytest.fixture(params=["file", "folder", "pattern", "rtsp"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """One source of each kind that this machine can have."""
    if request.param == "rtsp":
        return str(request.getfixturevalue("rtsp_url"))
    write = {"file": write_video, "folder": write_pictures, "pattern": drawn}[request.param]
    return write(tmp_path)


def test_every_kind_of_source_goes_through_encoder_and_decoder(source: str, service: Service) -> None:
    arguments = [*ENCODE, source, "--server", service.address, "--as-fast-as-possible"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as camera:
        wait_until_shown(service)
        if source.startswith("rtsp"):
            camera.send_signal(signal.SIGINT)
        _, told = camera.communicate(timeout=60)
    assert camera.returncode == 0, told
    known = service.server.cameras.get("camera")
    assert known is not None
    assert known.latest is not None
    if source.startswith("rtsp"):
        assert known.latest.pixels.shape == (240, 320)
    else:
        assert f"sent {FRAMES}" in told
        assert f"shown up to {FRAMES}, unwatched 0, dropped at the server 0" in told
        assert known.latest.pixels.shape == (48, 64)


def test_colour_is_said_not_to_be_sent(tmp_path: Path) -> None:
    from benchmarks.draw_clip import CLIP

    done = encode(str(CLIP), "--out", str(tmp_path / "m"), "--as-fast-as-possible")
    assert "colour is not sent yet" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("absent.mp4",), 2, "absent.mp4: no such video file"),
        (("/dev/video77",), 2, "no such camera"),
        (("pattern", "--name", "two words"), 2, "--name 'two words'"),
        (("pattern", "--name", ""), 2, "--name ''"),
        (("pattern", "--ratio", "0.9"), 2, "ratio 0.9"),
        (("pattern", "--operator", "absent.npz"), 2, "absent.npz: no such operator file"),
        (
            ("pattern", "--server", "127.0.0.1:9", "--give-up-seconds", "1"),
            1,
            "127.0.0.1:9: no decoder service answers",
        ),
        (("pattern", "--server", "127.0.0.1"), 2, "--server '127.0.0.1': expected HOST:PORT"),
        (("pattern", "--server", "localhost:99999"), 2, "--server 'localhost:99999': port 99999, expected 1 to 65535"),
        (("pattern", "--server", "localhost:0"), 2, "port 0, expected 1 to 65535"),
        (
            ("pattern", "--server", "::1:50051"),
            2,
            "--server '::1:50051': an IPv6 address stands in brackets, as in [::1]",
        ),
        (
            ("pattern", "--server", "[::1]:9", "--give-up-seconds", "1"),
            1,
            "[::1]:9: no decoder service answers",
        ),
        (("pattern", "--overwrite"), 2, "--overwrite: no file is written; give --out FILE"),
        (("pattern", "--spool", ""), 2, "--spool '': expected a folder"),
        (("pattern", "--spool-size", "9999999"), 2, "--spool-size: there is no spool; give --spool DIR"),
        (("pattern", "--spool-hours", "1"), 2, "--spool-hours: there is no spool"),
        (("pattern", "--spool-rate", "1", "--out", "/dev/null"), 2, "--spool-rate: there is no spool"),
        (("pattern", "--out", "/nonexistent/m"), 1, "/nonexistent/m: can't be written"),
        (("pattern", "--out", "/dev/full"), 1, "No space left"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(arguments: tuple[str, ...], code: int, problem: str) -> None:
    done = encode(*arguments)
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert len(errors) == 1
    assert problem in errors[0]
    assert "captured 0" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_there_is_replaced_only_if_that_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "messages"
    arguments = ["pattern:64x48@50#3", "--as-fast-as-possible", "--out", str(out)]
    out.write_bytes(b"kept")
    refused_out(encode(*arguments), f"--out {out}: is there already: another name, or --overwrite")
    assert out.read_bytes() == b"kept"
    assert encode(*arguments, "--overwrite").returncode == 0
    assert len(list(read_messages(out))) == 4
    out.write_bytes(b"")
    assert encode(*arguments).returncode == 0, "there is nothing to lose"
    assert encode(*arguments[:-1], "/dev/null").returncode == 0


@pytest.mark.parametrize("write", [write_pictures, write_video])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_what_is_filmed_is_never_overwritten(write: Callable[[Path], str], more: list[str], tmp_path: Path) -> None:
    """Also under another name: a link to it."""
    folder = tmp_path / "clips"
    folder.mkdir()
    source = Path(write(folder))
    link = tmp_path / "link"
    link.symlink_to(source)
    filmed = {path: path.read_bytes() for path in folder.iterdir()}
    if source.is_dir():
        elsewhere = tmp_path / "elsewhere.png"
        elsewhere.hardlink_to(source / "000.png")
        outs, problem = [source / "000.png", link / "new", elsewhere], "lies in the source"
    else:
        outs, problem = [source, link], "is the source itself"
    for out in outs:
        done = encode(str(source), "--as-fast-as-possible", "--out", str(out), *more)
        refused_out(done, f"--out {out}: {problem}")
        assert {path: path.read_bytes() for path in folder.iterdir()} == filmed


def refused_out(done: subprocess.CompletedProcess[str], problem: str) -> None:
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert problem in line


def test_an_operator_that_the_server_does_not_have(service: Service, tmp_path: Path) -> None:
    from tests.encoder.test_sampling import small_operator

    other = small_operator()
    other.save(tmp_path / "other.npz")
    done = encode(
        "pattern:64x64", "--ratio", "0.15", "--operator", str(tmp_path / "other.npz"), "--server", service.address
    )
    assert done.returncode == 1
    assert f"NOT_FOUND, hello.operator_id: '{other.id}'" in done.stderr


def test_ctrl_c_ends_cleanly_with_a_summary(service: Service) -> None:
    with subprocess.Popen(
        [*ENCODE, "pattern:64x48@30", "--server", service.address], stderr=subprocess.PIPE, text=True
    ) as camera:
        wait_until_shown(service)
        camera.send_signal(signal.SIGINT)
        _, told = camera.communicate(timeout=20)
    assert camera.returncode == 0, told
    assert "captured" in told.splitlines()[-1]


def test_the_version() -> None:
    done = encode("--version")
    assert (done.returncode, done.stdout) == (0, f"veilcam {version('veilcam')}\n")


def test_the_live_line_says_why_frames_were_dropped(service: Service) -> None:
    """On a terminal; a number up to which frames are acknowledged isn't told as a count."""
    ours, its = os.openpty()
    arguments = [*ENCODE, "pattern:64x48@30", "--server", service.address]
    with subprocess.Popen(arguments, stderr=its, env=os.environ | {"COLUMNS": "500", "TERM": "xterm"}) as camera:
        os.close(its)
        try:
            told = ""
            while not re.search(r"sent \d+, acknowledged up to [1-9]\d*, shown up to \d+", told):
                told += os.read(ours, 4096).decode(errors="replace")
            service.stop()
            while not re.search(r"server away since 20.*, dropped here \d+ \(.*\d+ server away", told):
                told += os.read(ours, 4096).decode(errors="replace")
        finally:
            camera.kill()
            os.close(ours)


def test_json_log(tmp_path: Path) -> None:
    done = encode("pattern:64x48@50#3", "--out", str(tmp_path / "m"), "--as-fast-as-possible", "--log-json")
    lines = done.stderr.splitlines()
    assert lines
    assert all(json.loads(line)["levelname"] == "INFO" for line in lines)


def wait_until_shown(service: Service) -> None:
    wait_for(lambda: (camera := service.server.cameras.get("camera")) and camera.latest, "a picture that is shown")
