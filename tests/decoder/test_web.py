import json
import queue
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.server import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.test_service import Camera


def get(url: str) -> tuple[int, bytes, Any]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


@pytest.fixture
def shown(service: Service, operator: Operator, photographs: list[NDArray[np.uint8]]) -> Camera:
    """A camera named porch that has shown its first picture and is still there."""
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], time.time_ns()), 1)[0])
    camera.shown(1)
    return camera


@pytest.mark.usefixtures("shown")
def test_the_list_tells_what_the_page_shows(service: Service) -> None:
    status, body, _ = get(f"{service.page}/cameras.json")
    (told,) = json.loads(body)
    assert status == 200
    assert (told["name"], told["state"], told["sequence"], told["size"]) == ("porch", "live", 1, [448, 336])
    assert told["latency_ms"] > 0
    assert told["reconstructor"].endswith("(veiled)")


@pytest.mark.usefixtures("shown")
def test_a_still_is_a_jpeg_of_the_picture(service: Service, photographs: list[NDArray[np.uint8]]) -> None:
    status, body, headers = get(f"{service.page}/cameras/porch.jpg")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "image/jpeg", "no-store")
    picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture is not None
    assert picture.shape == (336, 448)
    assert np.abs(picture.astype(float) - photographs[0]).mean() < 12


@pytest.mark.usefixtures("shown")
def test_plain_stills_only_where_they_are_allowed_and_seen(service: Service) -> None:
    assert get(f"{service.page}/cameras/porch.jpg?rendition=plain")[0] == 404
    assert get(f"{service.page}/cameras/porch.jpg?rendition=sharp")[0] == 403


@pytest.mark.parametrize("path", ["/cameras/nobody.jpg", "/cameras/nobody.mjpeg", "/nothing"])
def test_what_is_not_there(service: Service, path: str) -> None:
    assert get(service.page + path)[0] == 404


def test_plain_is_refused_by_default(start_service: StartService, operator: Operator) -> None:
    service = start_service()
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, np.zeros((32, 32), np.uint8), "porch"))
    camera.answer()
    for kind in ("jpg", "mjpeg"):
        status, body, _ = get(f"{service.page}/cameras/porch.{kind}?rendition=plain")
        assert (status, b"only veiled" in body) == (403, True)
    camera.bye()


def test_mjpeg_gives_the_newest_pictures_and_ends_each_part_at_once(
    service: Service, shown: Camera, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    packer = Packer(operator, 0.1)
    with urllib.request.urlopen(f"{service.page}/cameras/porch.mjpeg", timeout=20) as stream:
        boundary = stream.headers["Content-Type"].partition("boundary=")[2]
        assert stream.readline().strip() == f"--{boundary}".encode()
        for sequence in (2, 3):
            part = read_part(stream, boundary)
            assert part.startswith(b"\xff\xd8")
            assert part.endswith(b"\xff\xd9")
            shown.say(frame=packer.pack(frame_of(photographs[sequence], time.time_ns()), sequence, key=True)[0])
    shown.bye()


def read_part(stream: Any, boundary: str) -> bytes:
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    data: bytes = stream.read(int(headers[b"content-length"]))
    assert stream.readline() == b"\r\n"
    assert stream.readline().strip() == f"--{boundary}".encode()
    return data


def test_pictures_are_saved_as_they_were_shown(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    service = start_service(Settings(port=0, http_port=0, save=tmp_path))
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0]), 7)[0])
    camera.shown(7)
    path, deadline = tmp_path / "porch" / "00000007.png", time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    saved = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    known = service.server.cameras.get("porch")
    assert known is not None
    assert known.latest is not None
    assert saved is not None
    assert np.array_equal(saved, known.latest.pixels)
    camera.bye()


def test_a_folder_that_cannot_be_written_does_not_stop_the_pictures(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    service = start_service(Settings(port=0, http_port=0, save=blocked))
    camera = Camera(service.channel())
    packer = Packer(operator, 0.1)
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    for sequence in (1, 2):
        camera.say(frame=packer.pack(frame_of(photographs[0]), sequence)[0])
        camera.shown(sequence)
        time.sleep(0.5)
    camera.bye()


def test_a_slow_viewer_gets_the_newest_picture_and_never_a_backlog(
    service: Service, shown: Camera, operator: Operator
) -> None:
    """Watch through the relay that every viewer uses: many pictures pass while the viewer is busy with one."""
    import asyncio

    known = service.server.cameras.get("porch")
    assert known is not None
    relay, seen = known.relays["veiled"], queue.SimpleQueue[int]()
    assert relay.latest is not None

    async def slow() -> None:
        latest = relay.latest
        assert latest is not None
        with relay.watch() as pictures:
            assert relay.viewers == 1
            async for picture in pictures:
                seen.put(picture.sequence)
                for sequence in range(10, 20):
                    latest.sequence = sequence
                    relay.publish(latest)
                if seen.qsize() == 3:
                    break
        assert relay.viewers == 0

    asyncio.run_coroutine_threadsafe(slow(), service.loop).result(10)
    assert [seen.get() for _ in range(3)] == [1, 19, 19]
    shown.bye()
