"""A camera above its limits isn't called silent for what the server makes it wait; a clock that is set isn't delay."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.peers import Camera
from tests.decoder.test_backlog import backlog
from tests.decoder.test_door import metric
from tests.waiting import wait_for

SMALL = np.zeros((32, 32), np.uint8)


def frames_of(operator: Operator, count: int) -> Iterator[pb.Frame]:
    packer = Packer(operator, 0.1)
    for number in range(1, count + 1):
        yield packer.pack(frame_of(SMALL, number * 10**6), number, key=True)[0]


@pytest.mark.parametrize("limit", ["max_byte_rate", "max_frame_rate"])
def test_a_camera_that_is_held_back_is_live_and_keeps_its_name(
    limit: str, start_service: StartService, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each frame has some seconds' worth of the limit, and a camera is silent after less."""
    for name in ("decoder.states.SILENT_AFTER_S", "decoder.cameras.SILENT_AFTER_S"):
        monkeypatch.setattr(name, 1.5)
    first, second = frames_of(operator, 2)
    allowed = {"max_byte_rate": len(first.payload) // 3, "max_frame_rate": 1 / 3}[limit]
    service = start_service(Settings.model_validate({"port": 0, "http": 0, limit: allowed}))
    states = list[str]()
    service.server.cameras.turned.append(lambda camera: states.append(camera.state))
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, SMALL, "porch"))
    camera.say(frame=first)
    camera.settled(1)
    camera.say(frame=second)
    known = service.server.cameras.get("porch")
    assert known is not None
    tries = 0
    while known.tally.received < 2:
        other = Camera(service.channel())
        other.say(hello=hello_of(operator, SMALL, "porch"))
        with pytest.raises(grpc.RpcError, match="'porch' is publishing already"):
            other.answer()
        tries += 1
    assert tries
    assert states[:2] == ["connecting", "live"]
    assert "silent" not in states
    camera.bye()


def test_backlogs_of_one_camera_are_read_together_no_faster_than_its_limit(
    start_service: StartService, operator: Operator, tmp_path: Path
) -> None:
    """Two at once, each of which alone has no more than is taken at once."""
    service = start_service(Settings(port=0, http=0, record=tmp_path, record_free=0, max_frame_rate=40))
    camera, frames = Camera(service.channel()), list(frames_of(operator, 40))
    hellos = [hello_of(operator, SMALL, "porch") for _ in range(3)]
    for epoch, hello in enumerate(hellos, 1):
        hello.epoch = epoch
    camera.say(hello=hellos[2])
    camera.say(frame=frames[0])
    camera.settled(1)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as both:
        answers = both.map(lambda hello: backlog(service, hello, frames), hellos[:2])
        assert [answer.recorded for answer in answers] == [40, 40]
    assert time.monotonic() - began > 80 / 40 - 1.05
    assert metric(service, "veilcam_slowed_seconds_total", camera="porch") > 0
    camera.bye()


def test_calls_that_end_while_they_are_held_back_record_nothing_more(
    start_service: StartService, operator: Operator, tmp_path: Path
) -> None:
    """Each has one frame, and begins a segment; the limit takes one in minutes."""
    service = start_service(Settings(port=0, http=0, record=tmp_path, record_free=0, max_frame_rate=0.01))
    camera, (frame,) = Camera(service.channel()), frames_of(operator, 1)
    hello = hello_of(operator, SMALL, "porch")
    hello.epoch = 1
    camera.say(hello=hello)
    camera.answer()
    with service.channel() as channel:
        for epoch in (2, 3):
            hello.epoch = epoch
            requests = [pb.PublishRequest(hello=hello), pb.PublishRequest(frame=frame)]
            with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
                CamerasStub(channel).Backlog(iter(requests), timeout=1)
    assert metric(service, "veilcam_slowed_seconds_total", camera="porch") > 0, "the frame came"
    assert list(tmp_path.glob("*/*")) == []
    camera.bye()


def test_a_clock_of_the_server_that_is_set_makes_no_camera_late(
    start_service: StartService, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, packer, real = start_service(), Packer(operator, 0.1), time.time_ns
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, SMALL, "porch"))
    states, offsets_s = list[str](), list[float]()
    service.server.cameras.turned.append(lambda camera: states.append(camera.state))
    for number, step_s in enumerate((0, 0, 5, -5, 0), 1):
        monkeypatch.setattr(time, "time_ns", lambda step_s=step_s: real() + step_s * 10**9)
        camera.say(frame=packer.pack(frame_of(SMALL, real()), number)[0])
        camera.settled(number)
        known = service.server.cameras.get("porch")
        assert known is not None
        known.look()
        offsets_s.append((known.clock_offset_ns or 0) / 1e9)
    assert "late" not in states
    assert offsets_s == pytest.approx([0, 0, 5, -5, 0], abs=1)
    camera.bye()
    wait_for(lambda: states[-1] == "gone", "a camera that is gone")
