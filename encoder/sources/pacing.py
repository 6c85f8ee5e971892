"""Real-time pace for sources that could run faster than what they show."""

import time
from collections.abc import Iterator


def due_times(frame_rate: float, paced: bool) -> Iterator[int]:
    """For each frame, wait until it is due and give that moment in ns since 1970; never waits if not ``paced``.

    A consumer that is late gets frames at once until it has caught up with the clock; it doesn't shift the schedule.
    """
    start, index = time.monotonic(), 0
    while True:
        if paced:
            time.sleep(max(0.0, start + index / frame_rate - time.monotonic()))
        yield time.time_ns()
        index += 1
