"""The cameras of a server: what each sees now, who watches it, and how its frames fare."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from decoder.admission import Policy, Refusal
from decoder.model import RENDITIONS
from decoder.pace import Pace
from decoder.pictures import Picture, Relay
from decoder.states import SILENT_AFTER_S, state_of
from decoder.stream import Measurement, Stream, Tally

_LATELY_S = 5.0
_WINDOW = 256
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, eq=False)
class Work:
    """What an engine is at: one rendition of one frame, for those who watched when it began."""

    measurement: Measurement
    rendition: str
    relay: Relay


class Camera:
    """A camera by its name, whether it is connected or not: viewers stay while streams come and go.

    Args:
        name: what it calls itself.
        work: set when there is something to reconstruct.
        pace, late_pace: how fast it is read, and all of its backlogs together beside it.
        turned: called when its state has changed.
    """

    def __init__(
        self,
        name: str,
        work: asyncio.Event,
        pace: Pace,
        late_pace: Pace,
        turned: "Callable[[Camera], object]" = lambda _: None,
    ) -> None:
        self.name = name
        self.pace, self.late_pace = pace, late_pace
        self.state = state_of(None)
        """One of ``decoder.states.STATES``."""
        self.since_ns = time.time_ns()
        """When that began, since 1970."""
        self._turned = turned
        self.came = False
        """It has connected since this server began; until then all that is known of it is what was recorded."""
        self.stream: Stream | None = None
        self.last_seen = time.monotonic()
        self.renditions: tuple[str, ...] = ()
        """What viewers can be given, first what they get who don't ask."""
        self.newest: Measurement | None = None
        self.latest: Picture | None = None
        """The last picture that was shown of it: of the rendition for those who don't ask, if anyone watches that."""
        self.tally = Tally()
        self.relays = {rendition: Relay(self._viewers_changed) for rendition in RENDITIONS}
        self._work = work
        self._taken: dict[str, Measurement] = {}
        self._served: dict[str, float] = {}
        self._at_work: list[Work] = []
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def look(self) -> None:
        """See how it is by now."""
        state = state_of(self.stream)
        if state != self.state:
            self.state, self.since_ns = state, time.time_ns()
            self._turned(self)

    def see(self, measurement: Measurement, size: int) -> None:
        """What the camera sees now, from a message of ``size`` bytes; what it saw before is over."""
        before, self.newest = self.newest, measurement
        self.last_seen = time.monotonic()
        self._arrivals.append((self.last_seen, size))
        self.tally.received += 1
        self.tally.bytes += size
        if before is not None:
            self._pass_over(before, "newer" if self.watched else "unwatched")
        self.look()
        self._viewers_changed()

    def repeats(self, measurement: Measurement) -> bool:
        """Whether a frame came before, on another stream of the same run of the camera, or one after it did."""
        newest, epoch = self.newest, measurement.stream.hello.epoch
        if not epoch or newest is None or newest.stream is measurement.stream or newest.stream.hello.epoch != epoch:
            return False
        return measurement.sequence <= newest.sequence

    def repeat(self, measurement: Measurement, size: int) -> None:
        """A frame came again, in a message of ``size`` bytes: it isn't shown again."""
        self.tally.received += 1
        self.tally.bytes += size
        self.tally.fates["repeated"] += 1
        measurement.stream.settle(measurement.sequence)

    def lack_base(self, size: int) -> None:
        """A difference came whose base isn't here, in a message of ``size`` bytes."""
        self.tally.received += 1
        self.tally.bytes += size
        self.tally.fates["no_base"] += 1
        self.look()

    def part(self, stream: Stream) -> None:
        """A stream is over: what it sent last has passed by, unless someone waits for it."""
        newest = self.newest
        if newest is not None and newest.stream is stream and not self.wanted():
            self._pass_over(newest, "unwatched")

    def wanted(self) -> list[tuple[float, str]]:
        """Renditions that someone watches and that no engine has taken yet: when each was last served, and its name."""
        if self.newest is None:
            return []
        watched = (name for name, relay in self.relays.items() if relay.viewers)
        return [(self._served.get(name, 0.0), name) for name in watched if self._taken.get(name) is not self.newest]

    def begin(self, rendition: str) -> Work:
        """An engine takes what the camera sees now, to make a rendition of it; ``end`` follows."""
        assert self.newest is not None
        work = Work(self.newest, rendition, self.relays[rendition])
        self._at_work.append(work)
        self._taken[rendition] = work.measurement
        self._served[rendition] = time.monotonic()
        return work

    def end(self, work: Work, picture: Picture | None) -> bool:
        """The engine is through: a picture for its viewers, or None if it failed. Whether it was shown."""
        self._at_work.remove(work)
        offered = self.relays[work.rendition] is work.relay
        if picture is None:
            work.measurement.failed = True
            if work.measurement is not self.newest or not self.wanted():  # else another rendition may be shown
                self._pass_over(work.measurement, "failed")
        elif offered:
            self._show(work, picture)
        elif work.measurement is not self.newest:
            self._pass_over(work.measurement, "unwatched")
        self._settle()
        return picture is not None and offered

    def offer(self, renditions: tuple[str, ...]) -> None:
        """From now on, viewers can be given these. Whoever watches another is let go."""
        self.renditions = renditions
        for name, relay in self.relays.items():
            if name not in renditions:
                relay.forget()  # whoever is slow isn't shown even the one that waits
                relay.close()
                self.relays[name] = Relay(self._viewers_changed)
                self._taken.pop(name, None)

    @property
    def rendition(self) -> str | None:
        """What viewers get who don't ask for another; None if there is nothing for them."""
        return self.renditions[0] if self.renditions else None

    @property
    def watched(self) -> bool:
        """Whether anyone is shown its pictures."""
        return any(relay.viewers for relay in self.relays.values())

    @property
    def clock_offset_ns(self) -> int | None:
        """Of its stream, as ``decoder.states.Clock`` has it; None while there is none."""
        return self.stream.clock.offset_ns if self.stream is not None else None

    def lately(self) -> tuple[float, float]:
        """Frames a second and kbit/s that came over the last few seconds."""
        now = time.monotonic()
        came = [(at, size) for at, size in self._arrivals if now - at < _LATELY_S]
        if len(came) < 2 or came[-1][0] == came[0][0]:
            return 0.0, 0.0
        seconds = came[-1][0] - came[0][0]
        return (len(came) - 1) / seconds, sum(size for _, size in came[1:]) * 8 / seconds / 1000

    def _show(self, work: Work, picture: Picture) -> None:
        self._decide(work.measurement, "shown")
        self.tally.shown[work.rendition] = self.tally.shown.get(work.rendition, 0) + 1
        if work.rendition == self.renditions[0] or not self.relays[self.renditions[0]].viewers:
            self.latest = picture
        work.measurement.stream.show(picture)
        work.relay.publish(picture)

    def _pass_over(self, measurement: Measurement, fate: str) -> None:
        """No engine will take it any more; if one has it, what becomes of it is open."""
        if all(work.measurement is not measurement for work in self._at_work):
            self._decide(measurement, fate)

    def _decide(self, measurement: Measurement, fate: str) -> None:
        """A frame has one fate, the first, and is counted once."""
        if measurement.fate:
            return
        if measurement.failed and fate != "shown":
            fate = "failed"
        measurement.fate = fate
        self.tally.fates[fate] += 1
        if fate == "newer":
            measurement.stream.drop()
        elif fate == "unwatched":
            measurement.stream.pass_by()

    def _viewers_changed(self) -> None:
        for name, relay in self.relays.items():
            if not relay.viewers and self._taken.get(name) is not self.newest:
                relay.forget()
        if self.wanted():
            self._work.set()
        self._settle()

    def _settle(self) -> None:
        """Tell the stream up to where nothing more happens with what it sent."""
        newest = self.newest
        if newest is None or newest.stream is not self.stream:
            return
        pending = [work.measurement for work in self._at_work] + ([newest] if self.wanted() else [])
        open_ones = (each.sequence for each in pending if each.stream is newest.stream)
        newest.stream.settle(min(open_ones, default=newest.sequence + 1) - 1)


class Cameras:
    """All cameras that a server knows, by name; at most as many as its policy allows."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.forgotten: list[Callable[[str], None]] = []
        """Called with the name of each camera that the server no longer knows."""
        self.turned: list[Callable[[Camera], object]] = []
        """Called with each camera whose state has changed."""
        self.closed = False
        self._turn = asyncio.Event()
        self._cameras: dict[str, Camera] = {}
        self._changed = asyncio.Event()
        self.work = asyncio.Event()
        """Set when there is something to reconstruct."""
        self.connected = asyncio.Event()
        """Set once the first camera is there."""

    def all(self) -> list[Camera]:
        """In order of their names."""
        return [self._cameras[name] for name in sorted(self._cameras)]

    def get(self, name: str) -> Camera | None:
        return self._cameras.get(name)

    def remember(self, name: str, seen_ns: int) -> None:
        """A camera that was here before this server began: gone, until it comes.

        Args:
            name: one that isn't known yet; if there are as many as allowed, it isn't from now on either.
            seen_ns: when it was seen last, since 1970.
        """
        if len(self._cameras) < self._policy.cameras:
            camera = self._cameras[name] = self._new(name)
            camera.since_ns = seen_ns
            camera.last_seen = time.monotonic() - max(0.0, (time.time_ns() - seen_ns) / 1e9)

    def _new(self, name: str) -> Camera:
        paces = Pace(name, self._policy), Pace(name, self._policy)
        return Camera(name, self.work, *paces, self._has_turned)

    def connect(self, stream: Stream) -> Camera:
        """Give a stream to the camera of its name.

        Raises:
            Refusal: the name is publishing, or there are as many cameras as allowed.
        """
        name = stream.hello.camera
        if self.closed:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "server", "shutting down")
        camera = self._cameras.get(name) or self._new(name)
        if camera.stream is not None:
            if time.monotonic() - camera.stream.last_message <= SILENT_AFTER_S:
                problem = f"{name!r} is publishing already"
                raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "hello.camera", problem)
            camera.stream.end(Refusal(grpc.StatusCode.ABORTED, "hello.camera", f"{name!r} came back on a newer stream"))
        while name not in self._cameras and len(self._cameras) >= self._policy.cameras:  # it may have been lowered
            self._forget_longest_gone()
        self._cameras[name] = camera
        camera.came = True
        camera.stream = stream
        camera.offer(stream.renditions)
        camera.look()
        self.connected.set()
        self.tell()
        return camera

    def disconnect(self, camera: Camera, stream: Stream) -> None:
        """The stream is over; the camera stays known."""
        camera.part(stream)
        if camera.stream is stream:
            camera.stream = None
            camera.look()

    def tell(self) -> None:
        """Tell whoever waits for any camera that there is a new picture, or a new camera."""
        self._changed.set()
        self._changed = asyncio.Event()

    def changed(self) -> asyncio.Event:
        """Set at the next picture of any camera, or when a camera comes.

        Taken before one looks, nothing is missed between the look and the wait.
        """
        return self._changed

    async def keep_looking(self) -> None:
        """See how all cameras are, again and again, until cancelled: what doesn't come tells nobody."""
        while True:
            for camera in self._cameras.values():
                camera.look()
            await asyncio.sleep(_LOOK_EVERY_S)

    def turn(self) -> asyncio.Event:
        """Set at the next change of any camera's state; taken before one looks, as ``changed``."""
        return self._turn

    def _has_turned(self, camera: Camera) -> None:
        for tell in self.turned:
            tell(camera)
        self._wake_turned()

    def _wake_turned(self) -> None:
        self._turn.set()
        self._turn = asyncio.Event()

    def close(self) -> None:
        """Let every viewer and every camera go."""
        self.closed = True
        for camera in self._cameras.values():
            for relay in camera.relays.values():
                relay.close()
            if camera.stream is not None:
                camera.stream.end(Refusal(grpc.StatusCode.UNAVAILABLE, "server", "shutting down"))
        self.tell()
        self._wake_turned()

    def _forget_longest_gone(self) -> None:
        gone = [camera for camera in self._cameras.values() if camera.stream is None]
        if not gone:
            problem = f"{len(self._cameras)} cameras are connected, this server allows no more"
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "hello.camera", problem)
        oldest = min(gone, key=lambda camera: camera.last_seen)
        oldest.offer(())
        oldest.newest = oldest.latest = None  # a camera and its relays know each other, and are collected much later
        del self._cameras[oldest.name]
        for tell in self.forgotten:
            tell(oldest.name)
