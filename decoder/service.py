"""The gRPC side: ``Cameras`` and ``Viewers`` of ``veilcam.v1``, and where a refusal becomes a status."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from decoder.access.addresses import address_of
from decoder.access.audit import Audit
from decoder.access.roles import WHO
from decoder.access.tls import names_shown
from decoder.admission import Policy, Refusal, check_hello, check_size, invalid
from decoder.cameras import Camera, Cameras
from decoder.catalogue import Catalogue
from decoder.pictures import Picture
from decoder.reconstruction import Worker
from decoder.recordings.recorder import Recorder
from decoder.recordings.track import Done
from decoder.stream import Measurement, Stream
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasServicer, ViewersServicer

log = logging.getLogger("veilcam.decode")

FIRST_MESSAGE_S = 10.0
"""A camera that connects and doesn't say who it is within so long is let go."""

_LOOK_S = 0.5
"""How often a backlog looks whether its camera is still there."""

UNREAD_S = 20.0
"""A viewer that reads nothing for so long is let go: it would keep an engine at work for nobody."""

_RENDITIONS = {pb.RENDITION_UNSPECIFIED: "", pb.RENDITION_VEILED: "veiled", pb.RENDITION_PLAIN: "plain"}
_RENDITION_NUMBERS = {"veiled": pb.RENDITION_VEILED, "plain": pb.RENDITION_PLAIN}
_ENCODINGS = (pb.ENCODING_UNSPECIFIED, pb.ENCODING_JPEG, pb.ENCODING_GRAY8)


class CamerasService(CamerasServicer):
    """Takes cameras' streams."""

    def __init__(
        self, cameras: Cameras, catalogue: Catalogue, worker: Worker, policy: Policy,
        recorder: Recorder | None = None, certified: bool = False,
    ) -> None:  # fmt: skip
        """A camera that is ``certified`` speaks for itself alone: for the name in its certificate."""
        self._certified = certified
        self._cameras = cameras
        self._recorder = recorder
        self._catalogue = catalogue
        self._worker = worker
        self._policy = policy

    async def Publish(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[pb.PublishRequest],
        context: "aio.ServicerContext[pb.PublishRequest, pb.PublishResponse]",
    ) -> AsyncIterator[pb.PublishResponse]:
        peer = unquote(context.peer())
        stream = camera = None
        try:
            stream = await self._admitted(request_iterator, context)
            camera = self._cameras.connect(stream)
            hello = stream.hello
            if self._recorder is not None:
                stream.recorded = False
                self._recorder.begin(hello, _here(stream.ask_key), _here(stream.keep))
            log.info("camera %s connected from %s: %d×%d", camera.name, peer, hello.width, hello.height)
            yield pb.PublishResponse(accepted=pb.Accepted(max_payload_bytes=self._policy.payload_bytes))
            async with aclosing(self._frames(request_iterator, camera, stream)) as acknowledgements:
                async for acknowledgement in acknowledgements:
                    yield pb.PublishResponse(acknowledgement=acknowledgement)
        except Refusal as refusal:
            if refusal.status is not grpc.StatusCode.UNAVAILABLE:
                name = stream.hello.camera if stream is not None else "(unknown)"
                log.warning("camera %s at %s refused: %s", name, peer, refusal)
            await _abort(context, refusal)
        finally:
            if camera is not None and stream is not None:
                if self._recorder is not None and camera.stream is stream:
                    self._recorder.end(camera.name)
                self._cameras.disconnect(camera, stream)
                log.info("camera %s disconnected", camera.name)

    async def Backlog(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[pb.PublishRequest],
        context: "aio.ServicerContext[pb.PublishRequest, pb.BacklogResponse]",
    ) -> pb.BacklogResponse:
        name = "(unknown)"
        try:
            stream = await self._admitted(request_iterator, context)
            name = stream.hello.camera
            return await self._late(request_iterator, stream)
        except Refusal as refusal:
            log.warning("backlog of camera %s at %s refused: %s", name, unquote(context.peer()), refusal)
            await _abort(context, refusal)
        except Exception:  # the camera is told to come again later, the log has it all
            log.exception("backlog of camera %s: it can't be taken", name)
            await _abort(context, Refusal(grpc.StatusCode.INTERNAL, "frame", "the server failed, see its log"))

    async def _late(self, requests: AsyncIterator[pb.PublishRequest], stream: Stream) -> pb.BacklogResponse:
        """Record a backlog, frame by frame: what is live goes first, on disk as well."""
        name = stream.hello.camera
        if self._recorder is None:
            raise Refusal(grpc.StatusCode.UNIMPLEMENTED, "server", "nothing is recorded here")
        if not stream.hello.epoch:
            raise invalid("hello.epoch", "0, expected the number of the camera's run")
        camera = self._publishing(name)
        track = self._recorder.begin_late(stream.hello)
        frames, before = 0, track.told.late
        while (request := await self._while_publishing(requests, name)) is not None:
            if not request.HasField("frame"):
                raise invalid("message", "expected a frame after the hello")
            measurement = await stream.receive(request.frame)
            if measurement is None:
                problem = f"{request.frame.base_sequence} isn't the frame before, expected that or a key frame"
                raise invalid("frame.base_sequence", problem)
            offer = partial(self._recorder.offer_late, track, request.frame, measurement.levels, time.time_ns())
            # Before it is taken: of calls with a frame each, which end then, none would wait for the one before.
            await asyncio.sleep(camera.late_pace.wait_after(len(request.frame.payload), camera.lately))
            await _written(offer)
            frames += 1
        await _written(partial(self._recorder.flush_late, track))
        recorded = track.told.late - before
        # Another backlog of the camera may have been recorded beside this one.
        return pb.BacklogResponse(recorded=min(recorded, frames), repeated=max(0, frames - recorded))

    async def _while_publishing(
        self, requests: AsyncIterator[pb.PublishRequest], name: str
    ) -> pb.PublishRequest | None:
        """The next message of a backlog; refused once its camera is gone, as when the server ends."""
        coming = asyncio.ensure_future(self._within_silence(requests))
        try:
            while not coming.done():
                self._publishing(name)
                await asyncio.wait([coming], timeout=_LOOK_S)
            return coming.result()
        finally:
            coming.cancel()

    def _publishing(self, name: str) -> Camera:
        camera = self._cameras.get(name)
        if camera is None or camera.stream is None:
            problem = f"{name!r} isn't publishing, what is live comes first"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "hello.camera", problem)
        return camera

    async def _admitted(
        self, requests: AsyncIterator[pb.PublishRequest], context: "aio.ServicerContext[Any, Any]"
    ) -> Stream:
        """The stream that a camera's first message begins; refused for whatever is wrong with that."""
        first = await _first(requests)
        if first is None or not first.HasField("hello"):
            raise invalid("message", "expected a hello first")
        if self._certified:
            _check_name(first.hello.camera, context)
        check_hello(first.hello)
        renditions = self._worker.admit(first.hello)
        block = self._catalogue.block(first.hello.operator_id)
        check_size(first.hello, block, self._policy)
        return Stream(first.hello, block, renditions, self._policy)

    async def _frames(
        self, requests: AsyncIterator[pb.PublishRequest], camera: Camera, stream: Stream
    ) -> AsyncGenerator[pb.Acknowledgement, None]:
        reader = asyncio.create_task(self._read(requests, camera, stream))
        try:
            while True:
                await stream.news.wait()
                if stream.problem:
                    raise stream.problem
                if over := reader.done() and stream.settled and stream.recorded:
                    camera.part(stream)
                stream.news.clear()
                yield stream.acknowledgement()
                if over and not stream.news.is_set():
                    break
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[pb.PublishRequest], camera: Camera, stream: Stream) -> None:
        try:
            while (request := await self._within_silence(requests)) is not None:
                if not request.HasField("frame"):
                    raise invalid("message", "expected a frame after the hello")
                measurement = await stream.receive(request.frame)
                size = len(request.frame.payload)
                if camera.stream is not stream or stream.problem:
                    continue
                self._take(camera, stream, measurement, request.frame)
                if wait := camera.pace.wait_after(size, camera.lately):
                    stream.hold_back(wait)
                    await asyncio.sleep(wait)
        except Refusal as refusal:
            stream.end(refusal)
        except Exception:  # the reader's task has no other listener: the camera is told, the log has it all
            log.exception("camera %s: its stream can't be read on", stream.hello.camera)
            stream.end(Refusal(grpc.StatusCode.INTERNAL, "frame", "the server failed, see its log"))
        finally:
            if self._recorder is not None and camera.stream is stream:
                ended = _here(stream.end_recording)
                self._recorder.end(camera.name, lambda _: ended())
            else:
                stream.recorded = True
            stream.news.set()

    def _take(self, camera: Camera, stream: Stream, measurement: Measurement | None, frame: pb.Frame) -> None:
        """A frame has come, or a difference (None) whose base isn't here."""
        size = len(frame.payload)
        if measurement is None:
            camera.lack_base(size)
            if self._recorder is not None:
                self._recorder.miss(camera.name)
            return
        if camera.repeats(measurement):
            camera.repeat(measurement, size)
        else:
            camera.see(measurement, size)
        if self._recorder is not None:
            self._recorder.offer(camera.name, frame, time.time_ns(), measurement.levels)
        else:
            stream.keep([measurement.sequence])

    async def _within_silence(self, requests: AsyncIterator[pb.PublishRequest]) -> pb.PublishRequest | None:
        try:
            async with asyncio.timeout(self._policy.silent_s):
                return await _next(requests)
        except TimeoutError:
            problem = f"nothing came for {self._policy.silent_s:g} s"
            raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "message", problem) from None


class ViewersService(ViewersServicer):
    """Gives pictures to programs."""

    def __init__(self, cameras: Cameras, policy: Policy, audit: Audit) -> None:
        self._cameras = cameras
        self._policy = policy
        self._audit = audit

    async def Watch(  # type: ignore[override]  # noqa: N802 - gRPC's name; what it gives is written, not yielded
        self, request: pb.WatchRequest, context: "aio.ServicerContext[pb.WatchRequest, pb.Picture]"
    ) -> None:
        address = address_of(context.peer())
        try:
            camera, rendition = self._asked(request)
            with camera.relays[rendition].watch() as pictures:
                await _given_or_gone(context.send_initial_metadata(()))
                async for picture in pictures:
                    _check_holds()
                    self._audit.gave(
                        "Watch", WHO.get(), address, camera.name, picture.rendition, picture.capture_time_ns
                    )
                    await write_message(context, await _message(picture, request.encoding))
            self._check_allowed(rendition)
            self._asked(request)  # it is let go for what would now refuse it, or for a while
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "watch.camera", "let go: the server is shutting down or changes")
        except Refusal as refusal:
            await _abort(context, refusal)

    async def Cameras(  # type: ignore[override]  # noqa: N802 - gRPC's name; what it gives is written, not yielded
        self, request: pb.CamerasRequest, context: "aio.ServicerContext[pb.CamerasRequest, pb.CameraStatus]"
    ) -> None:
        told: dict[str, tuple[str, int]] = {}
        try:
            while not self._cameras.closed:
                turn = self._cameras.turn()
                there = {each.name: each for each in self._cameras.all() if WHO.get().sees(each.name)}
                told = {name: before for name, before in told.items() if name in there}
                for name, camera in there.items():
                    now = camera.state, camera.since_ns
                    if told.get(name) != now:
                        told[name] = now
                        _check_holds()
                        await write_message(context, _status(camera))
                await turn.wait()
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "server", "shutting down")
        except Refusal as refusal:
            await _abort(context, refusal)

    def _asked(self, request: pb.WatchRequest) -> tuple[Camera, str]:
        if request.encoding not in _ENCODINGS:
            raise invalid("watch.encoding", f"{request.encoding} is unknown")
        if request.rendition not in _RENDITIONS:
            raise invalid("watch.rendition", f"{request.rendition} is unknown")
        if not WHO.get().sees(request.camera):
            problem = f"{request.camera[:80]!r} isn't among the cameras that {WHO.get().name} is given"
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "watch.camera", problem)
        asked = _RENDITIONS[request.rendition]
        if asked:
            self._check_allowed(asked)
        camera = self._cameras.get(request.camera)
        if camera is None or not camera.came:
            here = (each.name for each in self._cameras.all() if each.came and WHO.get().sees(each.name))
            known = ", ".join(here) or "none yet"
            raise Refusal(
                grpc.StatusCode.NOT_FOUND, "watch.camera", f"{request.camera[:80]!r} isn't here (here: {known})"
            )
        rendition = asked or camera.rendition
        if rendition is None or rendition not in camera.renditions:
            problem = f"no {rendition or 'permitted'} reconstructor for the operator of {camera.name!r} here"
            raise Refusal(grpc.StatusCode.NOT_FOUND, "watch.rendition", problem)
        self._check_allowed(rendition)
        return camera, rendition

    def _check_allowed(self, rendition: str) -> None:
        given = WHO.get().renditions(self._policy)
        if rendition not in given:
            problem = f"this server gives {WHO.get().name} only {', '.join(given)} pictures"
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "watch.rendition", problem)


def _here(tell: Callable[..., object]) -> Callable[..., None]:
    """A function for other threads that calls one in this one's loop."""
    loop = asyncio.get_running_loop()

    def told(*what: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is over, and with it whoever is told
            loop.call_soon_threadsafe(tell, *what)

    return told


async def _written(offer: Callable[[Done], object]) -> None:
    """Wait until the recorder is done with what it is offered."""
    done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def resolve(problem: str | None) -> None:
        if not done.done():
            done.set_result(problem)

    offer(_here(resolve))
    if problem := await done:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "server", f"a backlog can't be recorded now: {problem}")


def _check_name(camera: str, context: "aio.ServicerContext[Any, Any]") -> None:
    """Refuse a camera that speaks for another."""
    names = names_shown(context)
    if camera not in names:
        whom = ", ".join(map(repr, names)) or "nobody"
        problem = f"{camera[:80]!r}, its certificate is for {whom} and no camera speaks for another"
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "hello.camera", problem)


def _check_holds() -> None:
    """Let someone go whose token or role isn't what it was when they came."""
    if not WHO.get().holds():
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "authorization", "it has changed; ask again")


async def _first(requests: AsyncIterator[pb.PublishRequest]) -> pb.PublishRequest | None:
    try:
        return await asyncio.wait_for(_next(requests), FIRST_MESSAGE_S)
    except TimeoutError:
        problem = f"no hello within {FIRST_MESSAGE_S:.0f} s"
        raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "message", problem) from None


async def _next(requests: AsyncIterator[pb.PublishRequest]) -> pb.PublishRequest | None:
    """The next message, or None at the end; bytes that are no message are refused like any other malformed field."""
    try:
        return await anext(requests, None)
    except DecodeError:
        raise invalid("message", "not a veilcam.v1.PublishRequest") from None


async def _message(picture: Picture, encoding: "pb.Encoding.ValueType") -> pb.Picture:
    gray = encoding == pb.ENCODING_GRAY8
    height, width = picture.pixels.shape
    return pb.Picture(
        camera=picture.camera,
        sequence=picture.sequence,
        capture_time_ns=picture.capture_time_ns,
        shown_time_ns=picture.shown_time_ns,
        width=width,
        height=height,
        encoding=pb.ENCODING_GRAY8 if gray else pb.ENCODING_JPEG,
        data=picture.pixels.tobytes() if gray else await picture.jpeg(),
        rendition=_RENDITION_NUMBERS[picture.rendition],
        reconstructor_id=picture.reconstructor_id,
    )


def _status(camera: Camera) -> pb.CameraStatus:
    state = pb.CameraState.Value(f"CAMERA_STATE_{camera.state.upper()}")
    offset_ns = camera.clock_offset_ns
    return pb.CameraStatus(camera=camera.name, state=state, since_ns=camera.since_ns, clock_offset_ns=offset_ns)


async def write_message(context: "aio.ServicerContext[Any, Any]", message: pb.Picture | pb.CameraStatus) -> None:
    """Give a viewer a message; one that doesn't read it within a limit is refused more."""
    try:
        async with asyncio.timeout(UNREAD_S):  # wait_for would lose a cancellation that comes when a write is through
            await _given_or_gone(context.write(message))
    except TimeoutError:
        problem = f"nothing was read for {UNREAD_S:.0f} s"
        raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "watch", problem) from None


async def _given_or_gone(giving: Awaitable[None]) -> None:
    """Give a viewer something; to who is gone nothing can be given, and gRPC is about to cancel the call."""
    try:
        await giving
    except aio.InternalError:
        raise asyncio.CancelledError from None


async def _abort(context: "aio.ServicerContext[Any, Any]", refusal: Refusal) -> NoReturn:
    # gRPC keeps what abort raises until the collector comes; it needn't keep the frame that was refused along with it.
    refusal.__traceback__ = refusal.__context__ = None
    try:
        await context.abort(refusal.status, str(refusal))
    except aio.InternalError:
        raise asyncio.CancelledError from None  # there is nobody left to tell
    raise AssertionError("abort raises")
