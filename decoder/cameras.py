"""The cameras of a server: what each is, what it sent last, how its frames fare."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from decoder.admission import Limits, Refusal, check_frame, next_levels
from decoder.catalogue import RENDITIONS
from decoder.pictures import Picture, Relay, Times
from protos.v1 import veilcam_pb2 as pb

SILENT_AFTER_S = 3.0
"""A connected camera that sends nothing for so long is shown as silent, and a newer stream may take its name."""
_WINDOW = 120
_ASK_LOWER_EVERY_S = 1.0
_LASTING_DROPS, _LASTING_DROPS_S = 5, 2.0


@dataclass(frozen=True, eq=False)
class Measurement:
    """One frame's measurements, ready for a reconstructor: int8 (rows, H/B, W/B)."""

    sequence: int
    capture_time_ns: int
    levels: NDArray[np.int8]
    times: Times


class Stream:
    """One connection of a camera: the delta state, the newest measurement, and what to acknowledge."""

    def __init__(self, hello: pb.Hello, block: int, rendition: str, limits: Limits) -> None:
        self.hello = hello
        self.block = block
        self.rendition = rendition
        self.busy = False
        self.pending: Measurement | None = None
        self.last_message = time.monotonic()
        self.problem: Refusal | None = None
        self.news = asyncio.Event()
        self._limits = limits
        self._levels: NDArray[np.int8] | None = None
        self._received = 0
        self._shown = (0, 0)
        self._dropped = 0
        self._drops: deque[float] = deque(maxlen=_LASTING_DROPS)
        self._changes: set[pb.Change.ValueType] = set()
        self._asked_lower = 0.0

    async def receive(self, frame: pb.Frame) -> bool:
        """Check and unpack a frame; it becomes the pending measurement. False for a delta whose base isn't here.

        Raises:
            Refusal: a frame that is malformed.
        """
        received_ns, began = time.time_ns(), time.perf_counter()
        self.last_message = time.monotonic()
        check_frame(frame, self._received, self._limits)
        if frame.kind == pb.FRAME_KIND_DELTA and (self._levels is None or frame.base_sequence != self._received):
            self.ask_key()
            return False
        self._levels = await asyncio.to_thread(next_levels, frame, self.hello, self.block, self._levels)
        self._received = frame.sequence
        if self.pending is not None:
            self._dropped += 1
            self._note_drop()
        times = Times(received_ns, (time.perf_counter() - began) * 1e3)
        self.pending = Measurement(frame.sequence, frame.capture_time_ns, self._levels, times)
        self.news.set()
        return True

    def take(self) -> Measurement:
        """The pending measurement, for the worker; ``done`` follows."""
        measurement, self.pending, self.busy = self.pending, None, True
        assert measurement is not None
        return measurement

    def done(self, shown: Picture | None) -> None:
        """The measurement taken is through, and its picture ready for viewers if there is one."""
        self.busy = False
        if shown is not None:
            self._shown = (shown.sequence, shown.shown_time_ns)
        self.news.set()

    @property
    def settled(self) -> bool:
        """Whether every frame received was shown or dropped."""
        return self.pending is None and not self.busy

    def end(self, problem: Refusal) -> None:
        """End the stream with a status, from outside of it."""
        self.problem = problem
        self.news.set()

    def acknowledgement(self) -> pb.Acknowledgement:
        """The newest state; what to change is said once."""
        changes, self._changes = self._changes, set()
        return pb.Acknowledgement(
            received=self._received,
            shown=self._shown[0],
            shown_time_ns=self._shown[1],
            dropped=self._dropped,
            changes=sorted(changes),
        )

    def _note_drop(self) -> None:
        """Ask for a lower rate when drops go on: a single one is no overload."""
        now = time.monotonic()
        self._drops.append(now)
        lasting = len(self._drops) == _LASTING_DROPS and now - self._drops[0] < _LASTING_DROPS_S
        if lasting and now - self._asked_lower > _ASK_LOWER_EVERY_S:
            self._asked_lower = now
            self._change(pb.CHANGE_LOWER_RATE)

    def ask_key(self) -> None:
        """Ask the camera for a key frame."""
        self._change(pb.CHANGE_SEND_KEY)

    def _change(self, change: "pb.Change.ValueType") -> None:
        self._changes.add(change)
        self.news.set()


class Camera:
    """A camera by its name, whether it is connected or not: viewers stay while streams come and go."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stream: Stream | None = None
        self.last_seen = time.monotonic()
        self.rendition = RENDITIONS[0]
        """What viewers get who don't ask for another."""
        self.relays = {rendition: Relay() for rendition in RENDITIONS}
        self.shown_at: deque[float] = deque(maxlen=_WINDOW)
        self.latest: Picture | None = None

    def note_shown(self, picture: Picture) -> None:
        """Keep what the page tells about the camera."""
        self.last_seen = time.monotonic()
        self.shown_at.append(self.last_seen)
        self.latest = picture

    @property
    def state(self) -> str:
        """``live``, ``silent`` (connected, but nothing comes) or ``offline``."""
        if self.stream is None:
            return "offline"
        return "silent" if time.monotonic() - self.stream.last_message > SILENT_AFTER_S else "live"

    def frame_rate(self) -> float:
        """Pictures a second over the last few seconds."""
        now = time.monotonic()
        times = [t for t in self.shown_at if now - t < 5.0]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0


class Cameras:
    """All cameras that a server knows, by name; at most as many as its limits allow."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._cameras: dict[str, Camera] = {}
        self._changed = asyncio.Event()
        self.pending = asyncio.Event()
        self.connected = asyncio.Event()
        """Set once the first camera is there."""

    def all(self) -> list[Camera]:
        """In order of their names."""
        return [self._cameras[name] for name in sorted(self._cameras)]

    def get(self, name: str) -> Camera | None:
        return self._cameras.get(name)

    def connect(self, stream: Stream) -> Camera:
        """Give a stream to the camera of its name.

        Raises:
            Refusal: the name is publishing, or there are as many cameras as allowed.
        """
        name = stream.hello.camera
        camera = self._cameras.get(name) or Camera(name)
        if camera.stream is not None:
            if camera.state == "live":
                problem = f"{name!r} is publishing already"
                raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "hello.camera", problem)
            camera.stream.end(Refusal(grpc.StatusCode.ABORTED, "hello.camera", f"{name!r} came back on a newer stream"))
        if name not in self._cameras and len(self._cameras) >= self._limits.cameras:
            self._forget_longest_gone()
        self._cameras[name] = camera
        camera.stream = stream
        camera.rendition = stream.rendition
        for rendition, relay in camera.relays.items():
            relay.on_demand = rendition != stream.rendition
        self.connected.set()
        return camera

    def disconnect(self, camera: Camera, stream: Stream) -> None:
        """The stream is over; the camera stays known."""
        if camera.stream is stream:
            camera.stream = None

    def published(self) -> None:
        """Tell whoever waits for any camera's picture that there is one."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait until any camera has shown a picture."""
        await self._changed.wait()

    def close(self) -> None:
        """Let every viewer and every camera go."""
        for camera in self._cameras.values():
            for relay in camera.relays.values():
                relay.close()
            if camera.stream is not None:
                camera.stream.end(Refusal(grpc.StatusCode.UNAVAILABLE, "server", "shutting down"))
        self.published()

    def _forget_longest_gone(self) -> None:
        gone = [camera for camera in self._cameras.values() if camera.stream is None]
        if not gone:
            problem = f"{len(self._cameras)} cameras are connected, this server allows no more"
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "hello.camera", problem)
        oldest = min(gone, key=lambda camera: camera.last_seen)
        for relay in oldest.relays.values():
            relay.close()
        del self._cameras[oldest.name]
