"""Where a camera stood still, its recording has a hole that people see; and cameras of before are on the page."""

import json
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.catalogue import Catalogue
from decoder.recordings.playback import Recording, segments_of
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.peers import Camera
from tests.decoder.test_web import get
from tests.waiting import wait_for

S = 10**9
BEGAN = 1_700_000_000 * S


@pytest.mark.parametrize(
    ("steps", "stretches"),
    [
        ([0.1] * 12 + [60.0] + [0.1] * 5, 2),
        ([0.1] * 12 + [4.0] + [0.1] * 5, 1),
        ([0.1] * 12 + [30.0] + [0.1] * 12 + [60.0] + [0.1] * 3, 3),
    ],
)
def test_a_hole_is_seen_in_the_time_line_and_every_frame_is_there(
    steps: list[float],
    stretches: int,
    start_service: StartService,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    catalogue: Catalogue,
    tmp_path: Path,
) -> None:
    times = [BEGAN + round(at * S) for at in accumulate(steps)]
    service = film(times, start_service, operator, photographs[0], tmp_path)
    status, body, _ = get(f"{service}/recordings/camera.json")
    assert status == 200
    told = [(each["start_ms"], each["end_ms"]) for each in json.loads(body)["segments"]]
    assert len(told) == stretches
    assert (told[0][0], told[-1][1]) == (times[0] // 10**6, times[-1] // 10**6)
    assert sum(end - start for start, end in told) == pytest.approx(
        sum(step * 1000 for step in steps[1:] if step < 5), abs=3
    )
    shots = list(Recording(segments_of(tmp_path / "camera"), catalogue, "veiled").shots())
    assert [shot.capture_time_ns for shot in shots] == times


def test_a_camera_that_gives_few_pictures_has_no_file_for_each(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    film([BEGAN + number * 20 * S for number in range(12)], start_service, operator, photographs[0], tmp_path)
    assert len(list((tmp_path / "camera").glob("*.vcseg"))) <= 2


def film(
    times: list[int], start_service: StartService, operator: Operator, picture: NDArray[np.uint8], record: Path
) -> str:
    """Where the page of a service is that has recorded a camera's pictures of these times, the first a key frame."""
    service = start_service(Settings(port=0, http=0, record=record, record_free=0))
    camera, packer = Camera(service.channel()), Packer(operator, 0.1)
    camera.say(hello=hello_of(operator, picture))
    for number, time_ns in enumerate(times, 1):
        camera.say(frame=packer.pack(frame_of(picture, time_ns), number, key=number == 1)[0])
    camera.settled(len(times))
    camera.bye()
    wait_for(lambda: service.server.cameras.all()[0].stream is None, "the end of the stream")
    return service.page


def test_a_camera_of_before_a_restart_is_told_as_gone_and_its_recording_is_there(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    service = start_service(Settings(port=0, http=0, record=tmp_path, record_free=0))
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], BEGAN), 1, key=True)[0])
    camera.settled(1)
    camera.bye()
    service.stop()
    (tmp_path / "not a camera").mkdir()
    (tmp_path / "not a camera" / "1.vcseg").write_bytes(b"")

    again = start_service(Settings(port=0, http=0, record=tmp_path, record_free=0, max_cameras=1))
    (told,) = json.loads(get(f"{again.page}/cameras.json")[1])
    assert (told["name"], told["state"], told["renditions"]) == ("porch", "gone", [])
    assert get(f"{again.page}/recordings/porch.jpg?at=0")[0] == 200
    assert get(f"{again.page}/cameras/porch.jpg")[:2] == (404, b"no camera 'porch' here\n")

    camera = Camera(again.channel())
    camera.say(hello=hello_of(operator, photographs[0], "yard"))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], BEGAN), 1, key=True)[0])
    camera.settled(1)
    (told,) = json.loads(get(f"{again.page}/cameras.json")[1])
    assert told["name"] == "yard", "one that is gone makes room"
    camera.bye()
