"""What cameras saw is for the owner's eyes alone, whatever the umask."""

import getpass
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.catalogue import Catalogue
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.peers import Camera
from tests.waiting import wait_for


@pytest.fixture
def loose_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> set[tuple[str, int]]:
    found = [folder, *folder.rglob("*")]
    return {("folder" if path.is_dir() else "file", path.stat().st_mode & 0o777) for path in found}


def film(service: Service, operator: Operator, picture: NDArray[np.uint8]) -> None:
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, picture, "porch"))
        camera.say(frame=Packer(operator, 0.1).pack(frame_of(picture, 10**18), 1)[0])
        camera.settled(1)
        camera.bye()
        list(camera.call)


@pytest.mark.usefixtures("loose_umask")
def test_recordings_pictures_and_films_are_their_owners_alone(
    start_service: StartService, tmp_path: Path, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    recordings, pictures, films = tmp_path / "recordings", tmp_path / "pictures", tmp_path / "films"
    service = start_service(Settings(port=0, http=0, record=recordings, save=pictures))
    film(service, operator, photographs[0])
    wait_for(lambda: any(pictures.rglob("*.png")) and any(recordings.rglob("*.vcseg")), "a picture and a segment")
    service.stop()
    for folder in (recordings, pictures):
        assert modes(folder) == {("folder", 0o700), ("file", 0o600)}
    films.mkdir()
    command = [sys.executable, "-m", "decoder", "export", str(recordings / "porch"), str(films / "a.mp4")]
    done = subprocess.run([*command, "--engine", "onnxruntime"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (films / "a.mp4").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_others_may_look_into_is_told_and_left_so(
    start_service: StartService, tmp_path: Path, operator: Operator, photographs: list[NDArray[np.uint8]],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    recordings = tmp_path / "recordings"
    for folder, mode in ((recordings, 0o755), (recordings / "porch", 0o770)):
        folder.mkdir()
        folder.chmod(mode)
    service = start_service(Settings(port=0, http=0, record=recordings))
    film(service, operator, photographs[0])
    film(service, operator, photographs[1])
    wait_for(lambda: len(list(recordings.rglob("*.vcseg"))) == 2, "the second segment")
    told = re.findall(r"(\S+): others may look into it \(mode (\d+)\)", caplog.text)
    assert told == [(str(recordings), "755"), (str(recordings / "porch"), "770")], "once for each"
    assert recordings.stat().st_mode & 0o777 == 0o755
    assert {mode for kind, mode in modes(recordings) if kind == "file"} == {0o600}


def test_plain_pictures_that_leave_by_a_command_or_onto_the_disk_are_in_the_audit_log(
    start_service: StartService, catalogue: Catalogue, tmp_path: Path, operator: Operator,
    photographs: list[NDArray[np.uint8]], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "veilcam.audit")
    plain = Catalogue([each for each in catalogue.reconstructors if each.rendition == "plain"])
    settings = Settings(port=0, http=0, record=tmp_path / "r", save=tmp_path / "p", allow_plain=True)
    service = start_service(settings, plain)
    film(service, operator, photographs[0])
    wait_for(
        lambda: any((tmp_path / "p").rglob("*.png")) and any((tmp_path / "r").rglob("*.vcseg")),
        "a picture and a segment",
    )
    service.stop()
    who = f"os:{getpass.getuser()}"
    captured = "2001-09-09T01:46:40.000+00:00"
    line = f"plain picture of camera porch, captured {captured}, given to {who} (admin) at this machine by --save"
    assert [record.getMessage() for record in caplog.records if "plain picture" in record.getMessage()] == [line]

    for arguments, lines in ((["--plain"], 1), ([], 0)):
        command = [
            sys.executable,
            "-m",
            "decoder",
            "export",
            str(tmp_path / "r/porch"),
            str(tmp_path / "a.mp4"),
            "--overwrite",
        ]
        done = subprocess.run(
            [*command, *arguments, "--engine", "onnxruntime"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        told = f"plain pictures of camera porch, captured {captured} to {captured}, given to {who} at this machine"
        assert done.stderr.count(f"{told} by export") == lines

    command = [sys.executable, "-m", "decoder", "replay", str(tmp_path / "r/porch"), "--engine", "onnxruntime"]
    with subprocess.Popen([*command, "--allow-plain"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(f"given to {who} at this machine by replay" in line for line in process.stderr)
        process.terminate()
