"""One part of a spool: a segment as recordings have them, and which of its frames still wait."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from encoder.spool.ranges import Ranges
from protos.v1 import veilcam_pb2 as pb


@dataclass(eq=False)
class Part:
    """One segment of a spool.

    Attributes:
        epoch: the run that it is of.
        pending: sequences of its frames that the server isn't known to have, in order.
        last: sequence of its last frame.
        captured: when its first frame was, and its last, in ns since 1970.
        written: when its last frame was, by the monotonic clock; before that began, for what an earlier run has left.
        size: bytes on disk, with its index.
        hello: what its frames are sent under, of one that this run has written.
        began: when it was, by the monotonic clock.
        flushed: when it was brought onto the disk itself, by the monotonic clock; first, when it was begun.
        unflushed: it has frames that weren't.
        sending: it has been taken, and is neither done nor put back.
        unread: what it has isn't known yet, since the system couldn't read it.
        indexed: how many frames its index has, of one that is unread.
        not_before: when it may be sent again, or read again, by the monotonic clock.
    """

    path: Path
    epoch: int
    pending: Ranges = field(default_factory=Ranges)
    last: int = 0
    captured: tuple[int, int] = (0, 0)
    written: float = field(default_factory=time.monotonic)
    size: int = 0
    hello: pb.Hello | None = None
    began: float = field(default_factory=time.monotonic)
    flushed: float = field(default_factory=time.monotonic)
    unflushed: bool = False
    sending: bool = False
    unread: bool = False
    indexed: int = 0
    not_before: float = 0.0
