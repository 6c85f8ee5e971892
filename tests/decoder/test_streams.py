"""One camera's stream: its frames, what is acknowledged of them, and that each is counted once."""

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.catalogue import Catalogue
from decoder.engines.onnx_runtime import OnnxRuntimeEngine
from encoder.sampling import Operator
from protos.payload import Payload, Plane
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import Service, hello_of
from tests.decoder.conftest import Held
from tests.decoder.peers import TIMEOUT, Camera, altered, known_of, watch
from tests.waiting import wait_for


def test_frames_are_acknowledged_and_viewers_get_the_picture_that_the_engine_makes(
    service: Service,
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
    known = known_of(service)
    wait_for(lambda: all(known.relays[name].viewers for name in watching), "the viewers")
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


def test_a_coarser_quantiser_and_fewer_rows_are_understood(
    channel: grpc.Channel, camera: Camera, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
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


def test_a_delta_without_its_base_asks_for_a_key(camera: Camera, messages: list[pb.Frame]) -> None:
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
    known = known_of(service)
    assert (known.tally.received, known.tally.shown, known.tally.fates) == (3, {}, {"unwatched": 2})
    seen = next(ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT))
    assert seen.sequence == 3, "one who comes later is shown what the camera sees now"
    assert known.tally.shown == {"veiled": 1}
    camera.bye()


def test_what_is_shown_is_settled_while_the_next_frame_is_in_the_engine(
    service: Service, channel: grpc.Channel, camera: Camera, messages: list[pb.Frame], held: Held
) -> None:
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
