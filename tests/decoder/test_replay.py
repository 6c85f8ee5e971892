"""A recording played as if it were live."""

import os
import shutil
import signal
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.catalogue import SHIPPED, Catalogue
from decoder.recordings.playback import Recording, segments_of
from decoder.settings import Settings
from encoder.sampling import Operator
from protos.payload import Payload, Plane
from protos.segment import SegmentWriter
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import hello_of
from tests.decoder.test_film import told
from tests.decoder.test_settings import DECODE, Running
from tests.protos.segments import frames


def test_a_recording_is_replayed_as_if_it_were_live(
    recorded: Path, catalogue: Catalogue, photographs: list[NDArray[np.uint8]]
) -> None:
    arguments = [
        *DECODE,
        "--log-json",
        "replay",
        str(recorded),
        "--speed",
        "10",
        "--loop",
        "--from",
        "1970-01-01T00:00:03",
    ]
    arguments += ["--engine", "onnxruntime"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        service = Running(process)
        request = pb.WatchRequest(camera="camera", encoding=pb.ENCODING_GRAY8)
        service.until("played 6 frames; again")
        with grpc.insecure_channel(service.address) as channel:
            seen = {}
            for picture in ViewersStub(channel).Watch(request, timeout=60):
                pixels = np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width)
                seen[picture.capture_time_ns] = pixels
                if len(seen) >= 4:
                    break
        process.send_signal(signal.SIGINT)
        service.until("stopped")
    assert process.returncode == 0
    shots = {
        shot.capture_time_ns: shot.pixels for shot in Recording(segments_of(recorded), catalogue, "veiled").shots()
    }
    assert all(np.array_equal(pixels, shots[time_ns]) for time_ns, pixels in seen.items())


def test_a_replay_of_a_single_frame_takes_its_time(recorded: Path) -> None:
    """And is of the veil alone, though plain pictures are allowed: there is no other reconstructor."""
    arguments = [*DECODE, "--log-json", "replay", str(recorded), "--loop", "--allow-plain", "--engine", "onnxruntime"]
    arguments += ["--to", "1970-01-01T00:00:02", "--reconstructor", str(SHIPPED / "veil-r10.onnx")]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        service = Running(process)
        told = [service.until("played 1 frames; again")["asctime"] for _ in range(3)]
        first, _, third = (datetime.fromisoformat(str(each)) for each in told)
        assert third - first > timedelta(seconds=1), "by its own clock, however late it is read here"
        with grpc.insecure_channel(service.address) as channel:
            request = pb.WatchRequest(camera="camera")
            assert next(ViewersStub(channel).Watch(request, timeout=60)).rendition == pb.RENDITION_VEILED
        process.send_signal(signal.SIGINT)
        service.until("stopped")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere.vcseg"], "nowhere.vcseg: No such file"),
        (["EMPTY"], "no segments (*.vcseg) there"),
        (["RECORDED", "--from", "1980-01-01"], "no pictures in that range of time"),
        (["RECORDED", "--from", "1970-01-01T00:00:04", "--to", "1970-01-01T00:00:03"], "expected a time after --from"),
        (["ODD"], "1.vcseg: frame.payload: "),
    ],
)
def test_a_replay_that_cannot_be_is_one_line(
    arguments: list[str], problem: str, recorded: Path, tmp_path: Path, operator: Operator
) -> None:
    """The last one is only known to be odd by the service that it is played into."""
    (tmp_path / "empty").mkdir()
    writer = SegmentWriter(tmp_path / "1.vcseg", hello_of(operator, np.zeros((48, 64), np.uint8)))
    for frame in frames(2):
        writer.append(frame, 1)
    writer.close()
    places = {"RECORDED": recorded, "EMPTY": tmp_path / "empty", "ODD": tmp_path / "1.vcseg"}
    code, output = told(
        "replay", *(places.get(argument, argument) for argument in arguments), "--engine", "onnxruntime"
    )
    assert code == 2, output
    lines = [line for line in output.splitlines() if "ERROR" in line]
    assert len(lines) == 1
    assert problem in lines[0]
    assert "Traceback" not in output


def test_a_replay_whose_recording_goes_away_says_so_and_ends(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path / "camera")
    arguments = [*DECODE, "--log-json", "replay", str(tmp_path / "camera"), "--speed", "8", "--loop"]
    with subprocess.Popen([*arguments, "--engine", "onnxruntime"], stderr=subprocess.PIPE, text=True) as process:
        service = Running(process)
        service.until("played 8 frames; again")
        shutil.rmtree(tmp_path / "camera")
        left_out = service.until("was deleted meanwhile; it is left out")
        assert ".vcseg" in str(left_out["message"])
        assert "can be played" in str(service.until("no frame in that range")["message"])
    assert process.returncode == 2


def test_what_a_service_with_higher_limits_recorded_is_replayed(tmp_path: Path, operator: Operator) -> None:
    """Pictures of more pixels, and frames of more bytes, than a service takes that is told nothing of that."""
    hello = hello_of(operator, np.zeros((2592, 4096), np.uint8))
    side = operator.block
    levels = np.random.default_rng(0).integers(-127, 128, (side**2, 2592 // side, 4096 // side), np.int16)
    payload = Payload(operator.id, side, (Plane(levels),)).pack()
    assert hello.width * hello.height > Settings().max_pixels
    assert len(payload) > Settings().max_payload
    frame = pb.Frame(sequence=1, capture_time_ns=1, planes=[pb.PLANE_KIND_LUMA], kind=pb.FRAME_KIND_KEY)
    frame.payload = payload
    writer = SegmentWriter(tmp_path / "1.vcseg", hello)
    writer.append(frame, 1)
    writer.close()
    arguments = [*DECODE, "--log-json", "replay", str(tmp_path / "1.vcseg"), "--engine", "onnxruntime"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        Running(process).until("played 1 frames")
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0


def test_what_the_environment_tells_the_service_is_not_for_a_replay(recorded: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    environment = {**os.environ, "VEILCAM_RECORD": str(blocked), "VEILCAM_SAVE": str(blocked), "VEILCAM_BATCH": "0"}
    environment |= {"VEILCAM_HOST": "192.0.2.1", "VEILCAM_ENGINE": "onnxruntime"}
    arguments = [*DECODE, "--log-json", "replay", str(recorded), "--speed", "100"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as process:
        Running(process).until("played 8 frames")
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
