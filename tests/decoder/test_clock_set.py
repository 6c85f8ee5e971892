"""A camera whose clock is set while it is recorded: every picture is there, and each moment is found."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.catalogue import Catalogue
from decoder.recordings.film import write_film
from decoder.recordings.playback import Recording, RecordingError, segments_of
from decoder.recordings.replay import replay
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.segment import Segment
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.peers import Camera
from tests.decoder.test_web import get
from tests.waiting import wait_for

SECOND = 10**9
START = 1000 * SECOND


def film(
    service: Service, operator: Operator, photographs: Sequence[NDArray[np.uint8]], captured_ns: list[int]
) -> None:
    """A camera's stream of pictures that are alike, captured at these times by its clock."""
    camera, packer = Camera(service.channel()), Packer(operator, 0.1)
    camera.say(hello=hello_of(operator, photographs[0]))
    for number, time_ns in enumerate(captured_ns):
        frame = packer.pack(frame_of(photographs[number % 4], number), number + 1)[0]
        frame.capture_time_ns = time_ns
        assert (frame.kind == pb.FRAME_KIND_KEY) == (number == 0), "the clock is set where there is no key frame"
        camera.say(frame=frame)
        camera.settled(number + 1)
    camera.bye()
    wait_for(lambda: service.server.cameras.all()[0].stream is None, "the end of the stream")


def seen(service: Service, from_ms: int) -> list[int]:
    """Times in ms of what a page shows that goes from moment to moment."""
    at, times = from_ms, list[int]()
    while at:
        assert len(times) < 20
        status, _, headers = get(f"{service.page}/recordings/camera.jpg?at={at}")
        assert status == 200
        times.append(int(headers["X-Time-Ms"]))
        at = int(headers["X-Next-Ms"] or 0)
    return times


def test_a_clock_that_is_set_back_begins_a_segment_and_both_are_found(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], catalogue: Catalogue,
    tmp_path: Path,
) -> None:  # fmt: skip
    """At 3 s it is set back to 1.5 s: the page shows what came later where both have a moment, a film has all."""
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recordings", record_free=0))
    times = [START + int(seconds * SECOND) for seconds in (0, 1, 2, 3, 1.5, 2.5)]
    film(service, operator, photographs, times)
    folder = tmp_path / "recordings" / "camera"
    parts = [[frame for frame, _ in Segment(path).frames()] for path in sorted(folder.glob("*.vcseg"))]
    assert [[frame.capture_time_ns for frame in part] for part in parts] == [times[:4], times[4:]]
    assert all(part[0].kind == pb.FRAME_KIND_KEY for part in parts)
    start_ms = START // 10**6
    told = json.loads(get(f"{service.page}/recordings/camera.json")[1])
    assert told == {"segments": [{"start_ms": start_ms, "end_ms": start_ms + 3000}]}
    assert [each - start_ms for each in seen(service, start_ms)] == [0, 1000, 1500, 2500, 3000]
    assert [each - start_ms for each in seen(service, start_ms + 2100)] == [1500, 2500, 3000]
    played = Recording(segments_of(folder), catalogue, "veiled")
    assert [shot.capture_time_ns for shot in played.shots(times[4], times[3])] == [times[2], *times[4:]]
    assert write_film(played.shots(), tmp_path / "film.mp4").pictures == 6
    with av.open(str(tmp_path / "film.mp4")) as container:
        shown = [frame.time for frame in container.decode(video=0)]
    assert shown == pytest.approx([0, 1, 2, 3, 3, 4], abs=0.01)
    other, sent = start_service(), list[None]()
    asyncio.run(replay(played.segments, other.address, 1000, progress=lambda: sent.append(None)))
    assert len(sent) == 6
    known = other.server.cameras.get("camera")
    assert known is not None
    assert known.tally.received == 6


def test_a_clock_that_is_set_forward_by_decades_leaves_nothing_between(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], catalogue: Catalogue,
    tmp_path: Path,
) -> None:  # fmt: skip
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recordings", record_free=0))
    now_ms = time.time_ns() // 10**6
    times_ms = [5000, 6000, now_ms, now_ms + 1000]
    film(service, operator, photographs, [time_ms * 10**6 for time_ms in times_ms])
    told = json.loads(get(f"{service.page}/recordings/camera.json")[1])
    assert told["segments"] == [{"start_ms": first, "end_ms": last} for first, last in (times_ms[:2], times_ms[2:])]
    assert seen(service, 5000) == times_ms
    assert seen(service, now_ms // 2) == times_ms[1:]
    played = Recording(segments_of(tmp_path / "recordings" / "camera"), catalogue, "veiled")
    with pytest.raises(RecordingError, match=r"nothing was captured between 1970-01-01T00:00:06 and .*; export a film"):
        write_film(played.shots(), tmp_path / "film.mp4")
    assert write_film(played.shots(6 * SECOND + 1), tmp_path / "film.mp4").pictures == 2


def test_capture_times_that_fall_a_little_stay_in_one_segment_and_play_in_order(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    service = start_service(Settings(port=0, http=0, record=tmp_path, record_free=0))
    film(service, operator, photographs, [START + int(seconds * SECOND) for seconds in (0, 2, 1.5, 1.4, 3, 4)])
    assert len(list(tmp_path.glob("camera/*.vcseg"))) == 1
    start_ms = START // 10**6
    assert [each - start_ms for each in seen(service, start_ms)] == [0, 1400, 3000, 4000]
    assert [seen(service, start_ms + at)[0] - start_ms for at in (1450, 1999, 2000, 2999)] == [0, 0, 1400, 1400]
