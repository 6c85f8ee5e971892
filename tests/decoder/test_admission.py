"""What the service refuses of cameras and viewers, with which status, and how many it takes."""

import contextlib
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.engines.onnx_runtime import OnnxRuntimeEngine
from decoder.settings import Settings
from encoder.sampling import Operator
from protos.payload import Payload, Plane, PlaneKind
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import StartService, hello_of
from tests.decoder.peers import TIMEOUT, Camera, altered
from tests.waiting import wait_for


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


def test_a_camera_that_never_says_who_it_is(channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoder.service.FIRST_MESSAGE_S", 0.2)
    assert Camera(channel).refusal() == (grpc.StatusCode.DEADLINE_EXCEEDED, "message: no hello within 0 s")


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


def test_a_picture_with_more_blocks_than_the_engine_takes_is_refused(
    channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntimeEngine, "most_blocks", 20)
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    code, details = camera.refusal()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == "hello.width and hello.height: 448×336, an engine here takes no side of more than 320"


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
    taken: list[Camera] = []

    def free() -> bool:
        again = Camera(channel)
        again.say(hello=hello_of(operator, photographs[0]))
        with contextlib.suppress(grpc.RpcError):
            assert again.answer().HasField("accepted")
            taken.append(again)
        return bool(taken)

    wait_for(free, "the name, free again")
    taken[0].say(frame=messages[0])
    taken[0].settled(1)
    taken[0].bye()


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
