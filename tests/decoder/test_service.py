import asyncio
import gc
import queue
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray

from decoder.cameras import Camera as Known
from decoder.catalogue import SHIPPED, Catalogue, load_catalogue
from decoder.engines.onnx_runtime import OnnxRuntimeEngine
from decoder.server import ServerError
from decoder.service import write_message
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.payload import Payload, Plane, PlaneKind
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub, ViewersStub
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.waiting import wait_for

TIMEOUT = 20


def watched(channel: grpc.Channel, camera: str = "camera") -> Iterator[NDArray[np.uint8]]:
    """What a viewer of a camera is shown, pixel by pixel."""
    request = pb.WatchRequest(camera=camera, encoding=pb.ENCODING_GRAY8)
    for picture in ViewersStub(channel).Watch(request, timeout=60):
        yield np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width).copy()


class Camera:
    """A camera that says exactly what a test tells it to."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[pb.PublishRequest | None] = queue.SimpleQueue()
        self.call = CamerasStub(channel).Publish(iter(self._requests.get, None), timeout=60)

    def say(self, *, hello: pb.Hello | None = None, frame: pb.Frame | None = None) -> None:
        self._requests.put(pb.PublishRequest(hello=hello, frame=frame))

    def bye(self) -> None:
        self._requests.put(None)

    def answer(self) -> pb.PublishResponse:
        response: pb.PublishResponse = next(self.call)
        return response

    def shown(self, sequence: int) -> pb.Acknowledgement:
        while (told := self.answer().acknowledgement).shown < sequence:
            pass
        return told

    def settled(self, sequence: int) -> pb.Acknowledgement:
        while (told := self.answer().acknowledgement).settled < sequence:
            pass
        return told

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as error:
            for _ in self.call:
                pass
        assert isinstance(error.value, grpc.Call)
        return error.value.code(), error.value.details() or ""


@pytest.fixture
def channel(service: Service) -> Iterator[grpc.Channel]:
    with service.channel() as channel:
        yield channel


@pytest.fixture
def messages(operator: Operator, photographs: list[NDArray[np.uint8]]) -> list[pb.Frame]:
    packer = Packer(operator, 0.1)
    return [packer.pack(frame_of(picture, time.time_ns()), i)[0] for i, picture in enumerate(photographs, 1)]


def test_frames_are_acknowledged_and_viewers_get_the_picture_that_the_engine_makes(
    channel: grpc.Channel,
    operator: Operator,
    catalogue: Catalogue,
    photographs: list[NDArray[np.uint8]],
    messages: list[pb.Frame],
) -> None:
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    assert camera.answer().accepted.max_payload_bytes > 0
    watching = {
        name: ViewersStub(channel).Watch(
            pb.WatchRequest(camera="camera", rendition=number, encoding=pb.ENCODING_GRAY8), timeout=60
        )
        for name, number in (("veiled", pb.RENDITION_VEILED), ("plain", pb.RENDITION_PLAIN))
    }
    time.sleep(0.3)
    for message, picture in zip(messages, photographs, strict=True):
        camera.say(frame=message)
        told = camera.shown(message.sequence)
        assert (told.received, told.dropped, list(told.changes)) == (message.sequence, 0, [])
        levels = operator.quantise(operator.sample(picture, 26), (21, 28))
        for name, call in watching.items():
            seen = next(call)
            assert (seen.sequence, seen.capture_time_ns) == (message.sequence, message.capture_time_ns)
            reconstructor = catalogue.choose(operator.id, name, 26)
            assert reconstructor is not None
            assert seen.reconstructor_id == reconstructor.id
            expected = reconstructor.engine.reconstruct(levels[None])[0, :336, :448]
            assert np.array_equal(np.frombuffer(seen.data, np.uint8).reshape(seen.height, seen.width), expected)
            error = expected.astype(float) - picture
            assert 10 * np.log10(255**2 / (error**2).mean()) > 27
    camera.bye()


def test_a_viewer_gets_jpeg_and_veiled_when_it_does_not_say(
    channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame]
) -> None:
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.say(frame=messages[0])
    camera.settled(1)
    seen = next(ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT))
    assert (seen.encoding, seen.rendition) == (pb.ENCODING_JPEG, pb.RENDITION_VEILED)
    assert seen.data.startswith(b"\xff\xd8")
    camera.bye()


def hello(operator: Operator, **changes: object) -> pb.Hello:
    fields: dict[str, object] = {"camera": "bad", "operator_id": operator.id, "width": 64, "height": 48}
    return pb.Hello(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "status", "field"),
    [
        ({"camera": ""}, "INVALID_ARGUMENT", "hello.camera"),
        ({"camera": "../etc"}, "INVALID_ARGUMENT", "hello.camera"),
        ({"camera": "x" * 65}, "INVALID_ARGUMENT", "hello.camera"),
        ({"operator_id": "0" * 16}, "NOT_FOUND", "hello.operator_id"),
        ({"operator_id": ""}, "NOT_FOUND", "hello.operator_id"),
        ({"width": 0}, "INVALID_ARGUMENT", "hello.width"),
        ({"width": 70_000, "height": 16}, "RESOURCE_EXHAUSTED", "hello.width"),
        ({"width": 9000, "height": 1050}, "RESOURCE_EXHAUSTED", "hello.width"),
        ({"width": 100_000, "height": 100_000}, "RESOURCE_EXHAUSTED", "hello.width"),
        ({"width": 4294967295, "height": 4294967295}, "RESOURCE_EXHAUSTED", "hello.width"),
        ({"frame_rate": float("nan")}, "INVALID_ARGUMENT", "hello.frame_rate"),
        ({"frame_rate": -1.0}, "INVALID_ARGUMENT", "hello.frame_rate"),
    ],
)
def test_a_hello_that_is_refused(
    channel: grpc.Channel, operator: Operator, changes: dict[str, object], status: str, field: str
) -> None:
    camera = Camera(channel)
    camera.say(hello=hello(operator, **changes))
    code, details = camera.refusal()
    assert code.name == status
    assert details.startswith(field)


def test_a_first_message_that_is_no_hello(channel: grpc.Channel, messages: list[pb.Frame]) -> None:
    camera = Camera(channel)
    camera.say(frame=messages[0])
    assert camera.refusal() == (grpc.StatusCode.INVALID_ARGUMENT, "message: expected a hello first")
    silent = Camera(channel)
    silent.bye()
    assert silent.refusal()[0] is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("greeted", [False, True])
def test_bytes_that_are_no_message(
    channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]], greeted: bool
) -> None:
    hello = pb.PublishRequest(hello=hello_of(operator, photographs[0])).SerializeToString()
    publish: Any = channel.stream_stream("/veilcam.v1.Cameras/Publish")
    with pytest.raises(grpc.RpcError) as error:
        list(publish(iter([hello, b"\xff\xff\xff"] if greeted else [b"\xff\xff\xff"]), timeout=TIMEOUT))
    assert isinstance(error.value, grpc.Call)
    told = (error.value.code(), error.value.details())
    assert told == (grpc.StatusCode.INVALID_ARGUMENT, "message: not a veilcam.v1.PublishRequest")


def test_a_fault_of_the_server_ends_the_stream_with_a_status(
    channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("decoder.stream.check_frame", broken)
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.say(frame=messages[0])
    assert camera.refusal() == (grpc.StatusCode.INTERNAL, "frame: the server failed, see its log")


def test_the_last_frame_is_acknowledged_to_a_camera_that_has_said_goodbye(
    channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame]
) -> None:
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    for message in messages[:3]:
        camera.say(frame=message)
    camera.bye()
    last = [response.acknowledgement for response in camera.call][-1]
    assert (last.settled, last.shown, last.unwatched) == (3, 0, 3)


def test_a_camera_that_never_says_who_it_is(channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoder.service.FIRST_MESSAGE_S", 0.2)
    assert Camera(channel).refusal() == (grpc.StatusCode.DEADLINE_EXCEEDED, "message: no hello within 0 s")


def altered(message: pb.Frame, **changes: object) -> pb.Frame:
    copy = pb.Frame()
    copy.CopyFrom(message)
    for name, value in changes.items():
        if name == "planes":
            del copy.planes[:]
            copy.planes.extend(value)  # type: ignore[arg-type]
        else:
            setattr(copy, name, value)
    return copy


def payload(operator: Operator, shape: tuple[int, int, int] = (26, 21, 28), **changes: object) -> bytes:
    values = np.zeros(shape, np.int16)
    values[0] = int(str(changes.pop("level", 0)))
    plane = Plane(values, changes.pop("kind", PlaneKind.LUMA), changes.pop("quantiser", 1))  # type: ignore[arg-type]
    fields = {"operator_id": operator.id, "block": 16} | changes
    return Payload(planes=(plane,), **fields).pack()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"sequence": 0}, "INVALID_ARGUMENT", "frame.sequence"),
        ({"capture_time_ns": 0}, "INVALID_ARGUMENT", "frame.capture_time_ns"),
        ({"capture_time_ns": -5}, "INVALID_ARGUMENT", "frame.capture_time_ns"),
        ({"kind": 0}, "INVALID_ARGUMENT", "frame.kind"),
        ({"kind": 77}, "INVALID_ARGUMENT", "frame.kind"),
        ({"base_sequence": 3}, "INVALID_ARGUMENT", "frame.base_sequence"),
        ({"kind": pb.FRAME_KIND_DELTA}, "INVALID_ARGUMENT", "frame.base_sequence"),
        ({"planes": []}, "INVALID_ARGUMENT", "frame.planes"),
        ({"payload": b""}, "INVALID_ARGUMENT", "frame.payload: payload: 0 bytes"),
        ({"payload": b"garbage" * 20}, "INVALID_ARGUMENT", "frame.payload: magic"),
        ({"payload": bytes((8 << 20) + 1)}, "RESOURCE_EXHAUSTED", "frame.payload"),
        ({"payload": bytes(64 << 20)}, "RESOURCE_EXHAUSTED", ""),
    ],
)
def test_a_frame_that_is_refused_and_other_cameras_go_on(
    channel: grpc.Channel,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    messages: list[pb.Frame],
    changes: dict[str, object],
    status: str,
    told: str,
) -> None:
    good, bad = Camera(channel), Camera(channel)
    good.say(hello=hello_of(operator, photographs[0], "good"))
    bad.say(hello=hello_of(operator, photographs[0], "bad"))
    good.say(frame=messages[0])
    good.settled(1)
    bad.say(frame=altered(messages[0], **changes))
    code, details = bad.refusal()
    assert code.name == status
    assert details.startswith(told)
    good.say(frame=messages[1])
    assert good.settled(2).received == 2
    good.bye()


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"operator_id": "0" * 16}, "INVALID_ARGUMENT", "frame.payload: operator_id"),
        ({"block": 8}, "INVALID_ARGUMENT", "frame.payload: block"),
        ({"shape": (26, 20, 28)}, "INVALID_ARGUMENT", "frame.payload: plane.grid"),
        ({"shape": (257, 21, 28)}, "RESOURCE_EXHAUSTED", "frame.payload: plane"),
        ({"shape": (26, 2100, 2800)}, "RESOURCE_EXHAUSTED", "frame.payload: plane"),
        ({"kind": PlaneKind.CB}, "INVALID_ARGUMENT", "frame.planes"),
        ({"level": 128}, "INVALID_ARGUMENT", "frame.payload: plane.body"),
        ({"level": 2, "quantiser": 100}, "INVALID_ARGUMENT", "frame.payload: plane.body"),
    ],
)
def test_a_payload_that_is_not_what_was_announced(
    channel: grpc.Channel,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    changes: dict[str, object],
    status: str,
    told: str,
) -> None:
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    data = payload(operator, **changes)  # type: ignore[arg-type]
    kind = pb.FRAME_KIND_KEY
    camera.say(frame=pb.Frame(sequence=1, capture_time_ns=1, planes=[pb.PLANE_KIND_LUMA], kind=kind, payload=data))
    code, details = camera.refusal()
    assert code.name == status
    assert details.startswith(told)


def test_a_coarser_quantiser_and_fewer_rows_are_understood(
    channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.answer()
    levels = operator.sample(photographs[0], 10).T.reshape(10, 21, 28)
    coarse = Payload(operator.id, 16, (Plane(np.rint(levels / 2).astype(np.int16), quantiser=2),)).pack()
    kind = pb.FRAME_KIND_KEY
    camera.say(frame=pb.Frame(sequence=1, capture_time_ns=1, planes=[pb.PLANE_KIND_LUMA], kind=kind, payload=coarse))
    camera.settled(1)
    request = pb.WatchRequest(camera="camera", rendition=pb.RENDITION_VEILED, encoding=pb.ENCODING_GRAY8)
    seen = next(ViewersStub(channel).Watch(request, timeout=TIMEOUT))
    error = np.frombuffer(seen.data, np.uint8).reshape(336, 448) - photographs[0].astype(float)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 22
    camera.bye()


def test_a_delta_without_its_base_asks_for_a_key(
    channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame]
) -> None:
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.answer()
    delta = messages[1]
    assert delta.kind == pb.FRAME_KIND_DELTA
    camera.say(frame=delta)
    told = camera.answer().acknowledgement
    assert (told.received, list(told.changes)) == (0, [pb.CHANGE_SEND_KEY])
    camera.say(frame=altered(messages[0], sequence=5))
    camera.settled(5)
    camera.say(frame=altered(delta, sequence=6, base_sequence=5))
    assert camera.settled(6).received == 6
    camera.bye()


def test_a_name_is_taken_while_it_publishes_and_free_when_its_camera_is_gone(
    channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame]
) -> None:
    first, second = Camera(channel), Camera(channel)
    first.say(hello=hello_of(operator, photographs[0]))
    first.answer()
    second.say(hello=hello_of(operator, photographs[0]))
    code, details = second.refusal()
    assert (code, details) == (grpc.StatusCode.ALREADY_EXISTS, "hello.camera: 'camera' is publishing already")
    first.call.cancel()
    deadline = time.monotonic() + TIMEOUT
    while True:
        again = Camera(channel)
        again.say(hello=hello_of(operator, photographs[0]))
        try:
            assert again.answer().HasField("accepted")
            break
        except grpc.RpcError:
            assert time.monotonic() < deadline
    again.say(frame=messages[0])
    again.settled(1)
    again.bye()


def test_no_more_cameras_than_allowed_and_the_longest_gone_is_forgotten(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    service = start_service(Settings(port=0, http=0, max_cameras=2))
    with service.channel() as channel:
        cameras = [Camera(channel) for _ in range(4)]
        for index in (0, 1):
            cameras[index].say(hello=hello_of(operator, photographs[0], f"camera{index}"))
            cameras[index].answer()
        cameras[2].say(hello=hello_of(operator, photographs[0], "camera2"))
        code, details = cameras[2].refusal()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details.startswith("hello.camera: 2 cameras")
        cameras[0].bye()
        assert not [response for response in cameras[0].call if response.HasField("accepted")]
        cameras[3].say(hello=hello_of(operator, photographs[0], "camera3"))
        cameras[3].answer()
        names = [camera.name for camera in service.server.cameras.all()]
        assert names == ["camera1", "camera3"]
        for index in (1, 3):
            cameras[index].bye()
            assert not [response for response in cameras[index].call if response.HasField("accepted")]
        lowered = Settings(port=0, http=0, max_cameras=1)
        service.loop.call_soon_threadsafe(service.server.apply, lowered)
        last = Camera(channel)
        last.say(hello=hello_of(operator, photographs[0], "camera4"))
        last.answer()
        assert [camera.name for camera in service.server.cameras.all()] == ["camera4"]


def test_nothing_is_kept_of_the_pictures_of_a_camera_that_is_forgotten(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame]
) -> None:
    service = start_service(Settings(port=0, http=0, max_cameras=1))
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        camera.say(frame=messages[0])
        call = ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT)
        next(call)
        known = service.server.cameras.get("camera")
        assert known is not None
        assert known.latest is not None
        picture = weakref.ref(known.latest)
        gc.disable()
        try:
            call.cancel()
            camera.bye()
            wait_for(
                lambda: known is not None and known.stream is None and not known.watched,
                "the end of its stream and of its viewer",
            )
            other = Camera(channel)
            other.say(hello=hello_of(operator, photographs[0], "other"))
            other.answer()
            known = None
            wait_for(lambda: picture() is None, "the end of its last picture")
        finally:
            gc.enable()


@pytest.mark.parametrize(
    ("request_fields", "status", "told"),
    [
        ({"camera": "nobody"}, "NOT_FOUND", "watch.camera: 'nobody' isn't here (here: none yet)"),
        ({"camera": "nobody", "rendition": 9}, "INVALID_ARGUMENT", "watch.rendition"),
        ({"camera": "nobody", "encoding": 9}, "INVALID_ARGUMENT", "watch.encoding"),
    ],
)
def test_a_watch_that_is_refused(channel: grpc.Channel, request_fields: dict[str, int], status: str, told: str) -> None:
    with pytest.raises(grpc.RpcError) as error:
        next(ViewersStub(channel).Watch(pb.WatchRequest(**request_fields), timeout=TIMEOUT))  # type: ignore[arg-type]
    assert isinstance(error.value, grpc.Call)
    assert error.value.code().name == status
    assert (error.value.details() or "").startswith(told)


def test_plain_pictures_are_refused_unless_allowed(start_service: StartService) -> None:
    with start_service().channel() as channel, pytest.raises(grpc.RpcError) as error:
        next(ViewersStub(channel).Watch(pb.WatchRequest(camera="x", rendition=pb.RENDITION_PLAIN), timeout=TIMEOUT))
    assert isinstance(error.value, grpc.Call)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_an_engine_that_raises_is_rebuilt_and_if_that_does_not_help_its_cameras_are_told(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    service = start_service(catalogue=load_catalogue([SHIPPED], "onnxruntime", 1))
    failures = 0

    def broken(*_: object) -> None:
        nonlocal failures
        failures += 1
        raise RuntimeError("out of memory")

    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        watching = ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT)
        wait_for(lambda: bool((known := service.server.cameras.get("camera")) and known.watched), "the viewer")
        with monkeypatch.context() as patch:
            patch.setattr("decoder.engines.onnx_runtime.OnnxRuntimeEngine._run", broken)
            camera.say(frame=messages[0])
            assert camera.settled(1).shown == 0
            assert failures == 1
            camera.say(frame=messages[1])
            code, details = camera.refusal()
        assert code is grpc.StatusCode.INTERNAL
        assert details == "frame: the reconstructor failed, see the server's log"
        again = Camera(channel)
        again.say(hello=hello_of(operator, photographs[0]))
        again.say(frame=messages[0])
        assert again.shown(1).shown == 1
        assert next(watching).sequence == 1
        again.bye()


def test_a_frame_that_fails_in_one_rendition_is_shown_in_the_other(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = OnnxRuntimeEngine._run

    def broken(engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        if engine.model.told["rendition"] == "veiled":
            raise RuntimeError("out of memory")
        return run(engine, measurements)

    settings = Settings(port=0, http=0, allow_plain=True)
    service = start_service(settings, load_catalogue([SHIPPED], "onnxruntime", 1))
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        known = known_of(service)
        (veiled,) = watch(channel, known, "veiled")
        (plain,) = watch(channel, known, "plain")
        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntimeEngine, "_run", broken)
            camera.say(frame=messages[0])  # whoever was served longest ago is first: the veil
            assert camera.settled(1).shown == 1
            assert next(plain).sequence == 1
        assert known.tally.fates == {"shown": 1}
        camera.say(frame=messages[1])
        assert camera.shown(2).shown == next(veiled).sequence == next(plain).sequence == 2
        camera.bye()


def test_an_engine_that_cannot_be_rebuilt_ends_its_cameras_and_not_the_service(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    service = start_service(catalogue=load_catalogue([SHIPPED], "onnxruntime", 1))
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        (watching,) = watch(channel, known_of(service), "veiled")
        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntimeEngine, "_run", broken)
            patch.setattr(OnnxRuntimeEngine, "__init__", broken)
            camera.say(frame=messages[0])
            assert camera.refusal() == (
                grpc.StatusCode.INTERNAL,
                "frame: the reconstructor failed, see the server's log",
            )
        again = Camera(channel)
        again.say(hello=hello_of(operator, photographs[0]))
        again.say(frame=messages[0])
        assert next(watching).sequence == again.shown(1).shown == 1
        again.bye()


def test_a_camera_that_nobody_watches_is_not_reconstructed(
    service: Service, channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]],
    messages: list[pb.Frame],
) -> None:  # fmt: skip
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    for message in messages[:3]:
        camera.say(frame=message)
    told = camera.settled(3)
    assert (told.received, told.shown, told.unwatched, told.dropped) == (3, 0, 2, 0)
    known = service.server.cameras.get("camera")
    assert known is not None
    assert (known.tally.received, known.tally.shown, known.tally.fates) == (3, {}, {"unwatched": 2})
    seen = next(ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT))
    assert seen.sequence == 3, "one who comes later is shown what the camera sees now"
    assert known.tally.shown == {"veiled": 1}
    camera.bye()


class Held:
    """Engines that begin, and go on when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self._go, run = threading.Semaphore(0), threading.Semaphore(0), OnnxRuntimeEngine._run

        def held(engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
            if measurements.any():  # else it is only timed
                self.began.release()
                assert self._go.acquire(timeout=TIMEOUT)
            return run(engine, measurements)

        monkeypatch.setattr(OnnxRuntimeEngine, "_run", held)

    def go(self, runs: int = 1) -> None:
        self._go.release(runs)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.go(1000)


def watch(channel: grpc.Channel, known: Known, *renditions: str) -> list[Any]:
    """Viewers of renditions, once they are there."""
    numbers = {"veiled": pb.RENDITION_VEILED, "plain": pb.RENDITION_PLAIN}
    watching = [
        ViewersStub(channel).Watch(pb.WatchRequest(camera=known.name, rendition=numbers[each]), timeout=60)
        for each in renditions
    ]
    wait_for(lambda: all(known.relays[each].viewers for each in renditions), "the viewers")
    return watching


def known_of(service: Service) -> Known:
    known = service.server.cameras.get("camera")
    assert known is not None
    return known


def test_what_is_shown_is_settled_while_the_next_frame_is_in_the_engine(
    service: Service, channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]],
    messages: list[pb.Frame], held: Held,
) -> None:  # fmt: skip
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.answer()
    watching = watch(channel, known_of(service), "veiled")
    camera.say(frame=messages[0])
    assert held.began.acquire(timeout=TIMEOUT)
    camera.say(frame=messages[1])
    wait_for(lambda: (newest := known_of(service).newest) is not None and newest.sequence == 2, "the second frame")
    held.go()
    told = camera.settled(1)
    assert (told.settled, told.shown, next(watching[0]).sequence) == (1, 1, 1)


def test_each_frame_is_counted_once(
    service: Service, channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]],
    messages: list[pb.Frame], held: Held, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def key(sequence: int) -> pb.Frame:
        return altered(messages[0], sequence=sequence)

    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.say(frame=key(1))
    camera.say(frame=key(2))
    camera.settled(2)
    known = known_of(service)
    watching = watch(channel, known, "veiled", "plain")
    assert held.began.acquire(timeout=TIMEOUT)
    camera.say(frame=key(3))  # while an engine has the second
    camera.say(frame=key(4))
    camera.say(frame=altered(messages[1], sequence=5, base_sequence=3))
    wait_for(lambda: known.tally.fates["no_base"] == 1, "the frame without its base")
    held.go(1000)
    camera.settled(4)
    assert known.tally.fates == {"unwatched": 1, "shown": 2, "newer": 1, "no_base": 1}
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeEngine, "_run", lambda *_: 1 / 0)
        camera.say(frame=key(6))
        camera.settled(6)
    camera.say(frame=key(7))
    camera.shown(7)
    camera.settled(7)
    for call in watching:
        call.cancel()
    wait_for(lambda: not known.watched, "the end of its viewers")
    camera.say(frame=key(8))
    camera.bye()
    last = [response.acknowledgement for response in camera.call][-1]
    assert (last.settled, last.shown, last.dropped, last.unwatched) == (8, 7, 1, 2)
    assert known.tally.fates == {"unwatched": 2, "shown": 3, "newer": 1, "no_base": 1, "failed": 1}
    assert known.tally.received == known.tally.fates.total() == 8


def test_a_picture_is_shown_whichever_rendition_is_watched(
    service: Service, channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]],
    messages: list[pb.Frame],
) -> None:  # fmt: skip
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.answer()
    known = known_of(service)
    (watching,) = watch(channel, known, "plain")
    camera.say(frame=messages[0])
    assert camera.shown(1).shown == next(watching).sequence == 1
    assert known.latest is not None
    assert known.latest.rendition == "plain"
    camera.bye()


def test_a_picture_that_is_no_longer_allowed_when_the_engine_has_it_ready_is_shown_to_nobody(
    service: Service, channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]],
    messages: list[pb.Frame], held: Held,
) -> None:  # fmt: skip
    def allow_plain(allowed: bool) -> None:
        settings = service.server.settings.model_copy(update={"allow_plain": allowed})
        service.loop.call_soon_threadsafe(service.server.apply, settings)

    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.answer()
    known = known_of(service)
    (watching,) = watch(channel, known, "plain")
    camera.say(frame=messages[0])
    assert held.began.acquire(timeout=TIMEOUT)
    allow_plain(False)
    with pytest.raises(grpc.RpcError) as error:
        next(watching)
    assert isinstance(error.value, grpc.Call)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    allow_plain(True)
    held.go()
    camera.settled(1)
    assert (known.tally.shown, known.latest) == ({}, None)
    (again,) = watch(channel, known, "plain")
    held.go()
    assert next(again).sequence == 1, "it is made for those who may see it"


def test_a_camera_whose_reconstructors_are_no_longer_allowed_is_shown_to_nobody(
    start_service: StartService, catalogue: Catalogue, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    plain = Catalogue([each for each in catalogue.reconstructors if each.rendition == "plain"])
    service = start_service(Settings(port=0, http=0, allow_plain=True), plain)
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        service.loop.call_soon_threadsafe(service.server.apply, Settings(port=0, http=0))
        assert camera.refusal()[0] is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as error:
            next(ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT))
        assert isinstance(error.value, grpc.Call)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{service.page}/cameras/camera.jpg", timeout=TIMEOUT)
        assert refused.value.code == 404
        refused.value.close()


class Watched:
    """Cameras that are watched, and an engine for which a larger batch costs little more: how many frames it got."""

    def __init__(
        self, service: Service, catalogue: Catalogue, channel: grpc.Channel, hellos: list[pb.Hello], frame: pb.Frame
    ) -> None:
        self._frame, self._sequence = frame, 0
        self.service, self.catalogue, self.cameras = service, catalogue, [Camera(channel) for _ in hellos]
        self.calls: list[tuple[int, bool]] = []
        for camera, hello in zip(self.cameras, hellos, strict=True):
            camera.say(hello=hello)
            camera.answer()
        stub = ViewersStub(channel)
        self._watching = [stub.Watch(pb.WatchRequest(camera=hello.camera), timeout=60) for hello in hellos]
        wait_for(lambda: all(known.watched for known in service.server.cameras.all()), "the viewers")

    def run(self, engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        count, _, height, width = measurements.shape
        self.calls.append((count, bool(measurements.any())))
        time.sleep(0.02 + 0.001 * count)
        return np.zeros((count, height * engine.block, width * engine.block), np.uint8)

    def frames_at_once(self) -> list[int]:
        """Each sends a frame: the batches that they went through."""
        self._sequence += 1
        self.calls.clear()
        for camera in self.cameras:
            camera.say(frame=altered(self._frame, sequence=self._sequence))
        for camera in self.cameras:
            camera.settled(self._sequence)
        return [count for count, real in self.calls if real]

    def apply(self, catalogue: Catalogue | None = None, **changes: object) -> None:
        settings, applied = self.service.server.settings.model_copy(update=changes), threading.Event()
        self.service.loop.call_soon_threadsafe(self.service.server.apply, settings, catalogue)
        self.service.loop.call_soon_threadsafe(applied.set)
        assert applied.wait(TIMEOUT)


@pytest.fixture
def five(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Watched]:  # fmt: skip
    catalogue = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    service = start_service(catalogue=catalogue)
    hellos = [hello_of(operator, photographs[0], f"camera{number}") for number in range(5)]
    with service.channel() as channel:
        watched = Watched(service, catalogue, channel, hellos, messages[0])
        monkeypatch.setattr(OnnxRuntimeEngine, "_run", lambda *given: watched.run(*given))
        yield watched


def test_batches_grow_between_the_pictures_of_cameras_and_are_of_sizes_that_were_measured(five: Watched) -> None:
    assert five.frames_at_once() == [1] * 5, "nobody waits until it is known how many at once pay"
    wait_for(lambda: 4 in five.frames_at_once(), "batches of four")
    for _ in range(10):
        assert set(five.frames_at_once()) <= {1, 2, 4}
    five.apply(batch=2)
    assert set(five.frames_at_once()) <= {1, 2}
    five.apply(batch=16)
    wait_for(lambda: 4 in five.frames_at_once(), "batches of four again")


def test_a_batch_setting_that_is_raised_holds_for_sizes_that_are_measured_already(five: Watched) -> None:
    five.apply(batch=1)
    for _ in range(3):
        assert five.frames_at_once() == [1] * 5
    five.apply(batch=16)
    wait_for(lambda: 4 in five.frames_at_once(), "batches of four")


def test_more_frames_at_once_than_an_engine_takes_are_no_failure(
    five: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        if len(measurements) > 2:
            raise RuntimeError("out of memory")
        return five.run(engine, measurements)

    monkeypatch.setattr(OnnxRuntimeEngine, "_run", out_of_memory)
    (reconstructor,) = five.catalogue.reconstructors
    engine = reconstructor.engine
    wait_for(lambda: 2 in five.frames_at_once(), "batches of two")
    for _ in range(10):
        assert set(five.frames_at_once()) <= {1, 2}
    assert reconstructor.engine is engine, "it was not rebuilt"
    assert all(not camera.tally.fates["failed"] for camera in five.service.server.cameras.all())


def test_an_engine_that_is_replaced_is_let_go(five: Watched) -> None:
    five.frames_at_once()
    before = weakref.ref(five.catalogue.reconstructors[0].engine)
    five.apply(load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1))
    five.frames_at_once()
    wait_for(lambda: gc.collect() >= 0 and before() is None, "the end of the engine")


def test_a_picture_with_more_blocks_than_the_engine_takes_is_refused(
    channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntimeEngine, "most_blocks", 20)
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    code, details = camera.refusal()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == "hello.width and hello.height: 448×336, an engine here takes no side of more than 320"


def test_one_reconstruction_serves_every_viewer_of_a_rendition(
    service: Service, channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]],
    messages: list[pb.Frame],
) -> None:  # fmt: skip
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.answer()
    watching = [ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT) for _ in range(5)]
    known = service.server.cameras.get("camera")
    assert known is not None
    wait_for(lambda: known.relays["veiled"].viewers == 5, "five viewers")
    for message in messages[:3]:
        camera.say(frame=message)
        camera.shown(message.sequence)
        assert {next(call).sequence for call in watching} == {message.sequence}
    assert known.tally.shown == {"veiled": 3}
    camera.bye()


def test_a_viewer_that_stops_reading_is_let_go_and_others_are_not(
    service: Service, channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]],
    messages: list[pb.Frame], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("decoder.service.UNREAD_S", 0.5)
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.answer()
    request = pb.WatchRequest(camera="camera", encoding=pb.ENCODING_GRAY8)
    reading, unread = (ViewersStub(channel).Watch(request, timeout=60) for _ in range(2))
    known = service.server.cameras.get("camera")
    assert known is not None
    wait_for(lambda: known.relays["veiled"].viewers == 2, "two viewers")
    sequence = 0

    def left() -> bool:
        nonlocal sequence
        sequence += 1
        camera.say(frame=altered(messages[0], sequence=sequence))
        return next(reading).sequence == sequence and known.relays["veiled"].viewers == 1

    wait_for(left, "the end of the one that doesn't read")
    with pytest.raises(grpc.RpcError) as error:
        list(unread)
    assert isinstance(error.value, grpc.Call)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (error.value.details() or "").startswith("watch: nothing was read")
    camera.bye()


def test_a_viewer_who_leaves_just_when_a_picture_is_through_is_gone() -> None:
    async def left_at_once() -> bool:
        through = asyncio.get_running_loop().create_future()

        class Context:
            async def write(self, _: pb.Picture) -> None:
                await through

        async def watch() -> None:
            await write_message(Context(), pb.Picture())  # type: ignore[arg-type]
            await asyncio.Event().wait()

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.01)
        through.set_result(None)
        await asyncio.sleep(0)
        watching.cancel()
        done, _ = await asyncio.wait([watching], timeout=1)
        watching.cancel()
        return bool(done) and watching.cancelled()

    assert asyncio.run(left_at_once())


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "veilcam.v1.Cameras", "veilcam.v1.Viewers"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=TIMEOUT)
    names = {service.name for service in answer.list_services_response.service}
    assert {"veilcam.v1.Cameras", "veilcam.v1.Viewers", "grpc.health.v1.Health"} <= names


def test_shutdown_lets_viewers_and_cameras_go_within_its_limit(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame]
) -> None:
    service = start_service()
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.say(frame=messages[0])
        camera.settled(1)
        watching = ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=60)
        next(watching)
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        with pytest.raises(grpc.RpcError) as error:
            next(watching)
        assert isinstance(error.value, grpc.Call)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert camera.refusal() == (grpc.StatusCode.UNAVAILABLE, "server: shutting down")
        stopping.join(20)
        assert not stopping.is_alive()


def test_an_engine_that_hangs_keeps_nothing_else_from_ending(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    held: Held, tmp_path: Path,
) -> None:  # fmt: skip
    """What was recorded is on the disk while the engine has most of its time to end left."""

    def recorders() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "recorder"}

    others = recorders()
    service = start_service(Settings(port=0, http=0, record=tmp_path))
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        (watching,) = watch(channel, known_of(service), "veiled")
        camera.say(frame=messages[0])
        assert held.began.acquire(timeout=TIMEOUT)
        assert recorders() > others
        stopping = asyncio.run_coroutine_threadsafe(service.server.stop(10 * TIMEOUT), service.loop)
        wait_for(lambda: recorders() == others, "the end of its recorder")
        assert not stopping.done()
        held.go()
        stopping.result(TIMEOUT)
        with pytest.raises(grpc.RpcError):
            list(watching)


def test_a_taken_port_is_told(start_service: StartService) -> None:
    first = start_service()
    with pytest.raises(ServerError, match=r"--port.*can't listen"):
        start_service(Settings(port=first.server.port, http=0))
    with pytest.raises(ServerError, match=r"--http.*can't listen"):
        start_service(Settings(port=0, http=first.server.http_port))
