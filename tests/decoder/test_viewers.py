"""Who watches by gRPC: what they are shown, what they no longer may be, and how they leave."""

import asyncio
import gc
import urllib.error
import urllib.request
import weakref

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.catalogue import Catalogue
from decoder.service import write_message
from decoder.settings import Settings
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import Service, StartService, hello_of
from tests.decoder.conftest import Held
from tests.decoder.peers import TIMEOUT, Camera, altered, known_of, watch
from tests.waiting import wait_for


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


def test_a_viewer_whose_headers_came_sees_the_very_next_frame(
    channel: grpc.Channel, camera: Camera, messages: list[pb.Frame]
) -> None:
    watching = ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT)
    watching.initial_metadata()
    camera.say(frame=messages[0])
    assert camera.shown(1).shown == next(watching).sequence == 1
    camera.bye()


def test_one_reconstruction_serves_every_viewer_of_a_rendition(
    service: Service, channel: grpc.Channel, camera: Camera, messages: list[pb.Frame]
) -> None:
    watching = [ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT) for _ in range(5)]
    known = known_of(service)
    wait_for(lambda: known.relays["veiled"].viewers == 5, "five viewers")
    for message in messages[:3]:
        camera.say(frame=message)
        camera.shown(message.sequence)
        assert {next(call).sequence for call in watching} == {message.sequence}
    assert known.tally.shown == {"veiled": 3}
    camera.bye()


def test_a_picture_is_shown_whichever_rendition_is_watched(
    service: Service, channel: grpc.Channel, camera: Camera, messages: list[pb.Frame]
) -> None:
    known = known_of(service)
    (watching,) = watch(channel, known, "plain")
    camera.say(frame=messages[0])
    assert camera.shown(1).shown == next(watching).sequence == 1
    assert known.latest is not None
    assert known.latest.rendition == "plain"
    camera.bye()


def test_a_picture_that_is_no_longer_allowed_when_the_engine_has_it_ready_is_shown_to_nobody(
    service: Service, channel: grpc.Channel, camera: Camera, messages: list[pb.Frame], held: Held
) -> None:
    def allow_plain(allowed: bool) -> None:
        settings = service.server.settings.model_copy(update={"allow_plain": allowed})
        service.loop.call_soon_threadsafe(service.server.apply, settings)

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


def test_a_viewer_who_is_slow_gets_no_picture_that_is_no_longer_allowed(
    service: Service, channel: grpc.Channel, camera: Camera, messages: list[pb.Frame]
) -> None:
    known = known_of(service)
    watching = ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT)
    watching.initial_metadata()
    camera.say(frame=messages[0])
    next(watching)
    relay = known.relays["veiled"]
    waits = relay.latest
    assert waits is not None

    async def slow() -> object:
        with relay.watch() as place:
            relay.publish(waits)
            known.offer(("plain",))
            return await anext(place, None)

    assert asyncio.run_coroutine_threadsafe(slow(), service.loop).result(TIMEOUT) is None
    camera.bye()


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


def test_a_viewer_that_stops_reading_is_let_go_and_others_are_not(
    service: Service, channel: grpc.Channel, camera: Camera, messages: list[pb.Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decoder.service.UNREAD_S", 0.5)
    request = pb.WatchRequest(camera="camera", encoding=pb.ENCODING_GRAY8)
    reading, unread = (ViewersStub(channel).Watch(request, timeout=60) for _ in range(2))
    known = known_of(service)
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
        through, writing = asyncio.get_running_loop().create_future(), asyncio.Event()

        class Context:
            async def write(self, _: pb.Picture) -> None:
                writing.set()
                await through

        async def watch() -> None:
            await write_message(Context(), pb.Picture())  # type: ignore[arg-type]
            await asyncio.Event().wait()

        watching = asyncio.create_task(watch())
        await writing.wait()
        through.set_result(None)
        await asyncio.sleep(0)
        watching.cancel()
        done, _ = await asyncio.wait([watching], timeout=1)
        watching.cancel()
        return bool(done) and watching.cancelled()

    assert asyncio.run(left_at_once())
