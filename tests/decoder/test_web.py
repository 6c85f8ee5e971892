import json
import os
import queue
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from decoder.catalogue import SHIPPED, Catalogue, load_catalogue
from decoder.server import ServerError
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.peers import Camera, known_of
from tests.waiting import wait_for


def get(url: str) -> tuple[int, bytes, Any]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


@pytest.fixture
def shown(service: Service, operator: Operator, photographs: list[NDArray[np.uint8]]) -> Camera:
    """A camera named porch that has sent its first frame and is still there."""
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], time.time_ns()), 1)[0])
    camera.settled(1)
    return camera


@pytest.mark.usefixtures("shown")
def test_the_list_tells_what_the_page_shows(service: Service, catalogue: Catalogue, operator: Operator) -> None:
    status, body, _ = get(f"{service.page}/cameras.json")
    (told,) = json.loads(body)
    assert status == 200
    assert (told["name"], told["state"], told["size"]) == ("porch", "live", None), "nobody has watched yet"
    get(f"{service.page}/cameras/porch.jpg")
    (told,) = json.loads(get(f"{service.page}/cameras.json")[1])
    assert (told["name"], told["state"], told["sequence"], told["size"]) == ("porch", "live", 1, [448, 336])
    assert told["latency_ms"] > 0
    veil = catalogue.choose(operator.id, "veiled", 26)
    assert veil is not None
    assert told["reconstructor"] == veil.id
    models = {each["id"]: each for each in json.loads(get(f"{service.page}/reconstructors.json")[1])}
    assert models[veil.id]["measured"]["recognition"]
    assert (models[veil.id]["name"], models[veil.id]["rendition"]) == (veil.name, "veiled")


@pytest.mark.usefixtures("shown")
def test_a_still_is_a_jpeg_of_the_picture(service: Service, photographs: list[NDArray[np.uint8]]) -> None:
    status, body, headers = get(f"{service.page}/cameras/porch.jpg")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "image/jpeg", "no-store")
    picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture is not None
    assert picture.shape == (336, 448)
    assert np.abs(picture.astype(float) - photographs[0]).mean() < 12


def test_a_plain_still_is_made_when_it_is_asked_for(
    service: Service, shown: Camera, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """Of what the camera sees now, never of what it saw when somebody last asked."""
    still = f"{service.page}/cameras/porch.jpg?rendition=plain"
    status, _, headers = get(still)
    assert (status, headers["X-Sequence"]) == (200, "1")
    relay = known_of(service, "porch").relays["plain"]
    wait_for(lambda: relay.viewers == 0, "the end of its viewer")
    shown.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[1], time.time_ns()), 5)[0])
    shown.settled(5)
    assert relay.latest is None
    assert get(still)[2]["X-Sequence"] == "5"
    assert get(f"{service.page}/cameras/porch.jpg?rendition=sharp")[0] == 400
    shown.bye()


def test_metrics_tell_how_frames_fare(
    service: Service, shown: Camera, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    packer = Packer(operator, 0.1)
    for sequence in (2, 3):
        shown.say(frame=packer.pack(frame_of(photographs[sequence], time.time_ns()), sequence, key=True)[0])
    shown.settled(3)
    get(f"{service.page}/cameras/porch.jpg")
    status, body, headers = get(f"{service.page}/metrics")
    assert status == 200
    told = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    assert "version=1.0.0" in headers["Content-Type"]
    assert told["veilcam_frames_received_total", "porch"] == 3
    assert told["veilcam_frames_dropped_total", "porch", "unwatched"] == 2
    assert told["veilcam_frames_dropped_total", "porch", "newer"] == 0
    assert told["veilcam_pictures_shown_total", "porch", "veiled"] == 1
    assert told["veilcam_latency_seconds_count", "porch"] == 1
    assert told["veilcam_camera_state", "porch", "live"] == 1
    assert told["veilcam_received_bytes_total", "porch"] > 1000
    assert told["process_resident_memory_bytes",] > 1e6
    shown.bye()


def test_health_by_url(service: Service) -> None:
    assert get(f"{service.page}/healthz")[:2] == (200, b"alive\n")
    assert get(f"{service.page}/readyz")[:2] == (200, b"ready\n")


def pictures_of(body: bytes) -> list[tuple[str, int, bytes]]:
    found = []
    while body:
        told, size = struct.unpack_from("<II", body)
        head = json.loads(body[8 : 8 + told])
        found.append((head["name"], head["serial"], body[8 + told : 8 + told + size]))
        body = body[8 + told + size :]
    return found


def test_the_newest_pictures_of_all_cameras_in_one_answer(
    service: Service, shown: Camera, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    second = Camera(service.channel())
    second.say(hello=hello_of(operator, photographs[0], "yard"))
    second.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[4]), 1)[0])
    second.settled(1)
    seen: dict[str, int] = {}
    while len(seen) < 2:
        for name, serial, jpeg in pictures_of(get(f"{service.page}/pictures?seen={quote(json.dumps(seen))}")[1]):
            assert jpeg.startswith(b"\xff\xd8")
            seen[name] = serial
    assert seen == {"porch": 1, "yard": 1}
    only = pictures_of(get(f"{service.page}/pictures?camera=yard")[1])
    assert [(name, serial) for name, serial, _ in only] == [("yard", 1)]
    with ThreadPoolExecutor(1) as pool:
        relays = [camera.relays["veiled"] for camera in service.server.cameras.all()]
        wait_for(lambda: not any(relay.viewers for relay in relays), "the end of those who asked before")
        asked = pool.submit(get, service.page + '/pictures?seen={"porch":1,"yard":1}')
        wait_for(lambda: all(relay.viewers for relay in relays), "one who waits for what is newer")
        assert not asked.done()
        second.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[5]), 2)[0])
        assert [(name, serial) for name, serial, _ in pictures_of(asked.result(20)[1])] == [("yard", 2)]
    for camera in (shown, second):
        camera.bye()


def test_a_page_is_a_viewer_also_between_two_of_its_requests(
    service: Service, shown: Camera, operator: Operator, photographs: list[NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Else a camera whose picture comes while the page draws another's would be passed over, again and again."""
    packer = Packer(operator, 0.1)
    monkeypatch.setattr("decoder.pictures.LINGER_S", 60.0)
    assert [serial for _, serial, _ in pictures_of(get(f"{service.page}/pictures")[1])] == [1]
    shown.say(frame=packer.pack(frame_of(photographs[1], time.time_ns()), 2)[0])
    assert shown.shown(2).unwatched == 0
    monkeypatch.setattr("decoder.pictures.LINGER_S", 0.1)
    asked = quote(json.dumps({"porch": 1}))
    assert [serial for _, serial, _ in pictures_of(get(f"{service.page}/pictures?seen={asked}")[1])] == [2]
    wait_for(lambda: not known_of(service, "porch").watched, "the end of its viewers")
    shown.bye()


@pytest.mark.parametrize(
    "seen", ["[]", "{", "7", '{"porch":"x"}', '{"porch":[]}', '{"porch":1e999}', pytest.param("[" * 20_000, id="deep")]
)
def test_a_list_of_seen_pictures_that_is_malformed(service: Service, seen: str) -> None:
    status, body, _ = get(f"{service.page}/pictures?seen={quote(seen)}")
    assert (status, body.startswith(b"seen: expected JSON")) == (400, True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_foreign_names_for_loopback_are_refused(start_service: StartService, host: str) -> None:
    service = start_service(Settings(host=host, port=0, http=0))
    page = f"http://{f'[{host}]' if ':' in host else host}:{service.server.http_port}/cameras.json"
    assert get(page)[0] == 200
    request = urllib.request.Request(page, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=20)
    assert error.value.code == 400
    error.value.close()


def test_plain_alone_is_shown_where_there_is_no_veil_and_it_is_allowed(
    start_service: StartService, catalogue: Catalogue, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    plain = Catalogue([each for each in catalogue.reconstructors if each.rendition == "plain"])
    service = start_service(Settings(port=0, http=0, allow_plain=True), plain)
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0]), 1)[0])
    camera.settled(1)
    assert get(f"{service.page}/cameras/porch.jpg")[0] == 200
    assert len(pictures_of(get(f"{service.page}/pictures")[1])) == 1
    refusing = start_service(Settings(port=0, http=0), plain)
    other = Camera(refusing.channel())
    other.say(hello=hello_of(operator, photographs[0]))
    code, details = other.refusal()
    assert code is grpc.StatusCode.NOT_FOUND
    assert "only plain reconstructors" in details
    camera.bye()


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
    service = start_service(Settings(port=0, http=0, save=tmp_path))
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0]), 7)[0])
    camera.settled(7)
    wait_for(lambda: list(tmp_path.glob("porch/1-00000007.png")), "the picture's file")
    latest = known_of(service, "porch").latest
    assert latest is not None
    wait_for(
        lambda: np.array_equal(read_gray(tmp_path / "porch" / "1-00000007.png"), latest.pixels), "the whole picture"
    )
    camera.bye()


def read_gray(path: Path) -> NDArray[np.uint8]:
    picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    return np.zeros((1, 1), np.uint8) if picture is None else np.asarray(picture, np.uint8)


def test_a_recorded_still_that_its_engine_fails_on_is_told_and_the_engine_is_rebuilt(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    catalogue = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    service = start_service(Settings(port=0, http=0, record=tmp_path), catalogue)
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0]), 1)[0])
    camera.settled(1)
    still = f"{service.page}/recordings/porch.jpg?at=1"
    wait_for(lambda: get(still)[0] == 200, "the camera's picture")
    (reconstructor,) = catalogue.reconstructors
    before = reconstructor.engine
    with monkeypatch.context() as patch:
        patch.setattr("decoder.engines.onnx_runtime.OnnxRuntimeEngine._run", broken)
        assert get(still)[:2] == (503, b"the reconstructor failed, see the server's log\n")
    assert reconstructor.engine is not before
    assert get(still)[0] == 200
    camera.bye()


def test_a_folder_that_cannot_be_written_is_told_at_the_start(start_service: StartService, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ServerError, match=r"--save .*file: can't be written"):
        start_service(Settings(port=0, http=0, save=blocked))


def test_a_disk_that_fails_later_does_not_stop_the_pictures(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    service = start_service(Settings(port=0, http=0, save=tmp_path))
    (tmp_path / "porch").write_text("in the way")
    camera = Camera(service.channel())
    packer = Packer(operator, 0.1)
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    for sequence in (1, 2):
        camera.say(frame=packer.pack(frame_of(photographs[0]), sequence)[0])
        camera.settled(sequence)
        wait_for(lambda: "no more pictures are saved" in caplog.text, "a line for the first")
    camera.bye()


def test_a_disk_that_hangs_does_not_keep_the_service_from_stopping(
    start_service: StartService,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pipe in the place of the picture keeps whoever writes it until somebody reads."""
    monkeypatch.setattr("decoder.viewers.folder.open_new", lambda path: path.open("wb"))  # not in its place
    service = start_service(Settings(port=0, http=0, save=tmp_path))
    pipe = tmp_path / "porch" / "1-00000001.png.partial"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, photographs[0], "porch"))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0]), 1)[0])
    camera.shown(1)
    try:
        wait_for(
            lambda: any(thread.name.startswith("save") for thread in threading.enumerate()), "the thread that saves"
        )
        service.stop()
    finally:
        os.close(os.open(pipe, os.O_RDWR))


def test_a_picture_that_is_no_longer_allowed_when_its_turn_to_be_saved_comes_is_not_saved(
    start_service: StartService,
    catalogue: Catalogue,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for the picture before it, in whose place is a pipe that nobody reads yet."""
    monkeypatch.setattr("decoder.viewers.folder.open_new", lambda path: path.open("wb"))
    settings = Settings(port=0, http=0, save=tmp_path, allow_plain=True)
    plain = Catalogue([each for each in catalogue.reconstructors if each.rendition == "plain"])
    service = start_service(settings, plain)
    pipe = tmp_path / "porch" / "1-00000001.png.partial"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    cameras = {name: Camera(service.channel()) for name in ("porch", "yard")}
    for name, camera in cameras.items():
        camera.say(hello=hello_of(operator, photographs[0], name))
        camera.answer()
    relays = [known.relays["plain"] for known in service.server.cameras.all()]
    wait_for(lambda: all(relay.viewers for relay in relays), "a viewer of each")
    for camera in cameras.values():
        camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0]), 1)[0])
        camera.shown(1)
    service.loop.call_soon_threadsafe(service.server.apply, settings.model_copy(update={"allow_plain": False}))
    assert cameras["yard"].refusal()[0] is grpc.StatusCode.NOT_FOUND
    assert pipe.read_bytes().startswith(b"\x89PNG")
    wait_for(lambda: not any(relay.viewers for relay in relays), "the end of the viewers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["porch"]


def test_a_slow_viewer_gets_the_newest_picture_and_never_a_backlog(
    service: Service, shown: Camera, operator: Operator
) -> None:
    """Watch through the relay that every viewer uses: many pictures pass while the viewer is busy with one."""
    import asyncio

    known = known_of(service, "porch")
    relay, seen = known.relays["veiled"], queue.SimpleQueue[int]()
    get(f"{service.page}/cameras/porch.jpg")
    wait_for(lambda: relay.viewers == 0, "the end of its viewer")
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


def test_a_browser_that_stops_reading_is_let_go(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("decoder.server.UNREAD_S", 0.5)
    service = start_service()
    frame = Packer(operator, 0.1).pack(frame_of(photographs[0]), 1)[0]
    with service.channel() as channel, socket.socket() as connection:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0], "porch"))
        camera.answer()
        known = known_of(service, "porch")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", service.server.http_port))
        connection.sendall(b"GET /cameras/porch.mjpeg HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: known.relays["veiled"].viewers == 1, "the viewer")

        def left() -> bool:
            frame.sequence += 1
            camera.say(frame=frame)
            camera.settled(frame.sequence)
            return known.relays["veiled"].viewers == 0

        wait_for(left, "the end of the one that doesn't read")
        camera.bye()
