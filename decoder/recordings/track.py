"""A camera's stream, or its backlogs, on the way to disk: what is offered of it, and how its recording fares."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from decoder.recordings.held import Span
from protos.segment import SegmentWriter
from protos.v1 import veilcam_pb2 as pb

Done = Callable[[str | None], object]
"""Is told that it is done, or why it couldn't be; in the writer's thread."""
FAULT = "the server failed, see its log"
"""Why, where it is a fault of this program's."""


@dataclass
class Recorded:
    """How a camera's recording fares."""

    frames: int = 0
    bytes: int = 0
    dropped: int = 0
    """Received but not recorded, because the disk couldn't keep up or was full."""
    late: int = 0
    """Of the frames, those that came in a backlog."""
    repeated: int = 0
    """Received, live or in a backlog, when they were recorded already."""


def nobody(*_: object) -> None:
    """Whom there is nothing to tell."""


@dataclass(eq=False)
class Track:
    """One stream of a camera, or its backlogs of one run, on the way to disk.

    Any thread changes ``needs_key``, ``gap`` and what is ``told`` under the recorder's lock. ``offered_ns`` and
    ``usual_ns`` are for the thread that offers frames; from ``writer`` on, all is for the writer's thread alone.

    Attributes:
        kept: is told the sequences of frames that are flushed to disk.
        needs_key: only a key frame can be offered now.
        gap: frames of it were dropped since the last one that is on its way.
        offered_ns: when the frame offered last was captured.
        usual_ns: between two frames, of late.
        named: the name of its segment is on the disk itself.
        last: sequence of the frame written last, and when it was captured.
        first_ns: when the first frame of its segment was captured.
        passed: sequence of a frame that was passed over since, if one was, and its measurements if they are known.
        unkept: written, or found to be recorded, and not yet flushed.
        repeats: some of those were found to be recorded.
        began: when its segment did, or the wait for a look; if it is late, when a frame came last. In seconds.
        flushed: when it was, or when the first that is unkept came. In seconds.
        problem: of a backlog, why something that was written of it may not be on the disk; its flush tells.
    """

    hello: pb.Hello
    told: Recorded
    ask_key: Callable[[], object] = nobody
    kept: Callable[[list[int]], object] = nobody
    late: bool = False
    needs_key: bool = True
    gap: bool = False
    offered_ns: int | None = None
    usual_ns: int = 0
    writer: SegmentWriter | None = None
    span: Span | None = None
    named: bool = False
    last: tuple[int, int] = (0, 0)
    first_ns: int = 0
    passed: tuple[int, NDArray[np.int8] | None] | None = None
    unkept: list[int] = field(default_factory=list)
    repeats: bool = False
    began: float = 0.0
    flushed: float = 0.0
    problem: str | None = None


@dataclass(frozen=True, eq=False)
class Offer:
    """What the writer is to do: write a frame, or end a stream, or bring a backlog onto the disk.

    Attributes:
        size: bytes that it takes while it waits.
        apart: frames are missing before this one that may come in a backlog: it begins a segment.
        levels: the frame's measurements, where it may have to be coded anew.
        hole: the camera gave nothing for long before this one: it begins a segment.
    """

    track: Track
    frame: pb.Frame | None = None
    received_ns: int = 0
    size: int = 0
    apart: bool = False
    levels: NDArray[np.int8] | None = None
    done: Done = nobody
    hole: bool = False
