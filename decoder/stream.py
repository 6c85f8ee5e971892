"""One connection of a camera: the delta state, the newest measurement, how its frames fare, what to acknowledge."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from decoder.admission import Policy, Refusal, check_frame, next_levels
from decoder.pictures import Picture, Times
from decoder.states import Clock
from protos.v1 import veilcam_pb2 as pb

_ASK_LOWER_EVERY_S = 1.0
_LASTING_DROPS, _LASTING_DROPS_S = 5, 2.0
_MOST_KEPT = 4096
"""Ranges of frames that wait to be called kept, of a camera that reads no acknowledgements. It sends again whatever it
isn't told of."""

FATES = ("shown", "newer", "unwatched", "no_base", "failed", "repeated")
"""What a frame comes to: shown in one rendition or more; watched, and never shown because a newer one came; passed by
while nobody watched; a difference whose base isn't here; lost with an engine that failed, and shown in no rendition;
sent again by a camera that didn't know that it had come."""


@dataclass(eq=False)
class Measurement:
    """One frame's measurements, ready for a reconstructor: int8 (rows, H/B, W/B).

    Attributes:
        stream: that it came on.
        ready_s: when it was unpacked, by the monotonic clock.
        failed: an engine failed on it, in one rendition or more.
        fate: one of ``FATES``; empty while that is open.
    """

    stream: "Stream"
    sequence: int
    capture_time_ns: int
    levels: NDArray[np.int8]
    times: Times
    ready_s: float = field(default_factory=time.monotonic)
    failed: bool = False
    fate: str = ""


@dataclass
class Tally:
    """How the frames of a camera fared, over all of its streams."""

    received: int = 0
    bytes: int = 0
    shown: dict[str, int] = field(default_factory=dict)
    """Pictures, by rendition."""
    fates: Counter[str] = field(default_factory=Counter)
    """Frames, each once. Received and in none of them: what the camera sees now, and what an engine has."""


class Stream:
    """One connection of a camera.

    Args:
        hello: what it said, checked.
        block: side of its operator's blocks.
        renditions: that viewers can be given, first the one for those who don't ask.
        policy: of the server.
    """

    def __init__(self, hello: pb.Hello, block: int, renditions: tuple[str, ...], policy: Policy) -> None:
        self.hello = hello
        self.block = block
        self.renditions = renditions
        self.last_message = time.monotonic()
        """When a message came last, or by when the next is read."""
        self.clock = Clock()
        self.problem: Refusal | None = None
        self.news = asyncio.Event()
        self._policy = policy
        self._levels: NDArray[np.int8] | None = None
        self._received = 0
        self._shown = (0, 0)
        self._settled = 0
        self._dropped = 0
        self._unwatched = 0
        self._drops: deque[float] = deque(maxlen=_LASTING_DROPS)
        self._changes: set[pb.Change.ValueType] = set()
        self._asked_lower = 0.0
        self._kept: deque[tuple[int, int]] = deque(maxlen=_MOST_KEPT)
        self.recorded = True
        """Whether nothing more happens with any frame on its way to disk."""

    async def receive(self, frame: pb.Frame) -> Measurement | None:
        """Check and unpack a frame. None for a delta whose base isn't here; the camera is asked for a key frame.

        Raises:
            Refusal: a frame that is malformed.
        """
        received_ns, began = time.time_ns(), time.perf_counter()
        self.last_message = time.monotonic()
        check_frame(frame, self._received, self._policy)
        self.clock.tell(frame.capture_time_ns)
        if frame.kind == pb.FRAME_KIND_DELTA and (self._levels is None or frame.base_sequence != self._received):
            self.ask_key()
            return None
        self._levels = await asyncio.to_thread(next_levels, frame, self.hello, self.block, self._levels)
        self._received = frame.sequence
        times = Times(received_ns, (time.perf_counter() - began) * 1e3)
        self.news.set()
        return Measurement(self, frame.sequence, frame.capture_time_ns, self._levels, times)

    def hold_back(self, seconds: float) -> None:
        """The camera is above its limits: it is asked for less, and its next message isn't read before so long."""
        self.ask_lower()
        self.last_message = time.monotonic() + seconds

    def drop(self) -> None:
        """A frame was never shown to those who watch, because a newer one came."""
        self._dropped += 1
        self.news.set()
        now = time.monotonic()
        self._drops.append(now)
        # A single one is no overload.
        if len(self._drops) == _LASTING_DROPS and now - self._drops[0] < _LASTING_DROPS_S:
            self.ask_lower()

    def pass_by(self) -> None:
        """A frame passed by while nobody watched."""
        self._unwatched += 1
        self.news.set()

    def show(self, picture: Picture) -> None:
        """A picture is ready for those who watch."""
        if picture.sequence > self._shown[0]:
            self._shown = (picture.sequence, picture.shown_time_ns)
            self.news.set()

    def keep(self, sequences: list[int]) -> None:
        """Frames are recorded and flushed to disk, or received where nothing is recorded."""
        for first, last in ranges(sequences):
            if self._kept and self._kept[-1][1] == first - 1:
                self._kept[-1] = self._kept[-1][0], last
            else:
                self._kept.append((first, last))
        self.news.set()

    def end_recording(self) -> None:
        """Nothing more happens with any frame on its way to disk."""
        self.recorded = True
        self.news.set()

    def settle(self, sequence: int) -> None:
        """Nothing more happens with the frames up to this one."""
        if sequence > self._settled:
            self._settled = sequence
            self.news.set()

    @property
    def settled(self) -> bool:
        """Whether nothing more happens with any frame received."""
        return self._settled >= self._received

    def end(self, problem: Refusal) -> None:
        """End the stream with a status, from outside of it."""
        self.problem = problem
        self.news.set()

    def ask_key(self) -> None:
        """Ask the camera for a key frame."""
        self._change(pb.CHANGE_SEND_KEY)

    def ask_lower(self) -> None:
        """Ask the camera for fewer bits or frames, from time to time."""
        now = time.monotonic()
        if now - self._asked_lower > _ASK_LOWER_EVERY_S:
            self._asked_lower = now
            self._change(pb.CHANGE_LOWER_RATE)

    def acknowledgement(self) -> pb.Acknowledgement:
        """The newest state; what to change and what is kept are said once."""
        changes, self._changes = self._changes, set()
        kept = list(self._kept)
        self._kept.clear()
        return pb.Acknowledgement(
            received=self._received,
            shown=self._shown[0],
            shown_time_ns=self._shown[1],
            dropped=self._dropped,
            changes=sorted(changes),
            settled=self._settled,
            unwatched=self._unwatched,
            kept=[pb.Sequences(first=first, last=last) for first, last in kept],
        )

    def _change(self, change: "pb.Change.ValueType") -> None:
        self._changes.add(change)
        self.news.set()


def ranges(sequences: Iterable[int]) -> list[tuple[int, int]]:
    """Sequences as ranges, both ends included."""
    found: list[tuple[int, int]] = []
    for sequence in sequences:
        if found and found[-1][1] == sequence - 1:
            found[-1] = (found[-1][0], sequence)
        else:
            found.append((sequence, sequence))
    return found
