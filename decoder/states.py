"""How a camera is, and how far its clock is from this server's.

    hello ──▶ connecting ──first frame──▶ live ◀──▶ late ──nothing comes──▶ silent ──a frame──▶ live
    stream over ──▶ gone

``late``: the next frame is overdue, or the newest took a second longer from its capture to here than the quickest of
the last minute. ``silent``: connected, and nothing came for some seconds.
"""

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decoder.stream import Stream

STATES = ("connecting", "live", "late", "silent", "gone")
LATE_AFTER_S = 1.0
SILENT_AFTER_S = 3.0
_LONGEST_INTERVAL_S = 10.0
"""Between two frames; what a camera promises less often is looked at as if it were this."""
_RECORDED_NS = 600 * 10**9
"""Clocks that are further apart belong to a recording that is replayed, and nobody waits for its frames."""
_WINDOW_S = 60


class Clock:
    """A camera's clock beside this server's, from when its frames were captured and when they came.

    The least difference of the last minute is the server's clock minus the camera's, plus the quickest way of a frame
    from its capture to here. Nothing in the stream tells the two apart: it is the most by which the camera's clock may
    be behind; where it is below zero, the camera's clock is ahead by that at least.

    It is kept by a clock that nobody sets: frames don't seem to be longer on the way when this server's clock is set.
    """

    def __init__(self) -> None:
        self._least: deque[tuple[int, int]] = deque()
        self._newest_ns = 0

    def tell(self, captured_ns: int) -> None:
        """A frame came just now."""
        now_ns = time.monotonic_ns()
        second, self._newest_ns = now_ns // 10**9, now_ns - captured_ns
        while self._least and self._least[-1][1] >= self._newest_ns:
            self._least.pop()
        if not self._least or self._least[-1][0] != second:
            self._least.append((second, self._newest_ns))
        while self._least[0][0] < second - _WINDOW_S:
            self._least.popleft()

    @property
    def offset_ns(self) -> int | None:
        """The least difference; None before the first frame."""
        return self._least[0][1] + time.time_ns() - time.monotonic_ns() if self._least else None

    @property
    def delay_s(self) -> float:
        """How much longer the newest frame was on its way than the quickest."""
        return (self._newest_ns - self._least[0][1]) / 1e9 if self._least else 0.0


def state_of(stream: "Stream | None") -> str:
    """One of ``STATES``, of a camera with this stream, now."""
    if stream is None:
        return "gone"
    rate, offset_ns = stream.hello.frame_rate, stream.clock.offset_ns
    quiet_s = time.monotonic() - stream.last_message - (min(_LONGEST_INTERVAL_S, 1 / rate) if rate else 0.0)
    if quiet_s > SILENT_AFTER_S:
        return "silent"
    if offset_ns is None:
        return "connecting"
    behind = stream.clock.delay_s > LATE_AFTER_S and abs(offset_ns) < _RECORDED_NS
    return "late" if quiet_s > LATE_AFTER_S or behind else "live"
