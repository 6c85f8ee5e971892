"""What ends a segment: it is full, frames are missing or passed over, the camera stood still, or its clock was set.

Capture times rise in a segment, but for little: where a camera's clock is set, another begins.
"""

from dataclasses import dataclass

from decoder.recordings.held import Held
from decoder.recordings.store import GAP_NS
from decoder.recordings.track import Offer, Track
from protos.v1 import veilcam_pb2 as pb

_UNSTEADY_NS = 10**9
"""Capture times may fall by so much without that the clock was set."""
_HOLE = 10
"""How many times its usual step a camera stands still, at least, for that to end a segment: few frames are no holes."""


@dataclass(frozen=True)
class SegmentLimits:
    """When a segment ends and the next begins, at the next key frame."""

    seconds: float = 600.0
    megabytes: float = 64.0

    def was_set(self, before_ns: int, captured_ns: int) -> bool:
        """Whether the camera's clock was set between two frames: a segment is short by that clock too, and rises."""
        return not -_UNSTEADY_NS <= captured_ns - before_ns <= self.seconds * 1e9

    def is_full(self, size: int, seconds: float) -> bool:
        """Whether a segment of so many bytes, that began so long ago, has had enough."""
        return seconds > self.seconds or size > self.megabytes * (1 << 20)


def take_step(track: Track, captured_ns: int, limits: SegmentLimits) -> tuple[bool, bool]:
    """What lies between a live frame and the one offered before it, dropped or not; in the thread that offers it.

    Returns:
        Whether its camera gave nothing for long, and whether the camera's clock was set.
    """
    before_ns, track.offered_ns = track.offered_ns, captured_ns
    step_ns = captured_ns - before_ns if before_ns is not None else 0
    was_set = before_ns is not None and limits.was_set(before_ns, captured_ns)
    hole = step_ns > max(GAP_NS, _HOLE * track.usual_ns)
    if step_ns and not was_set:
        track.usual_ns = (7 * track.usual_ns + step_ns) // 8 if track.usual_ns else step_ns
    return hole, was_set


def ends_before(offer: Offer, frame: pb.Frame, held: Held, limits: SegmentLimits, now: float) -> bool:
    """Whether a track's segment, if it has one, ends before a frame; in the writer's thread.

    A camera whose segment is full is asked for a key frame: it ends there.
    """
    track, key = offer.track, frame.kind == pb.FRAME_KIND_KEY
    if track.writer is None:
        return False
    epoch, (before, captured_ns) = track.hello.epoch, track.last
    over = offer.hole or track.passed is not None or limits.was_set(captured_ns, frame.capture_time_ns)
    seconds = (frame.capture_time_ns - track.first_ns) / 1e9
    full = limits.is_full(track.writer.size, seconds if track.late else max(seconds, now - track.began))
    if full and not key and not over:
        track.ask_key()
    over = over or (key and (full or (offer.apart and epoch > 0)))
    if track.late and not over:
        over = frame.sequence <= before
        over = over or held.begins_between(track.hello.camera, epoch, before, frame.sequence)
    return over
