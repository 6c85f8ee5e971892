"""The clock that capture times come from: a step of it is told, since times and latencies of pictures step with it."""

import logging
import time

log = logging.getLogger("veilcam.encode")

STEP_S = 5.0
"""A frame that was captured so much later or earlier than time has passed since the one before: the clock was set."""


class CaptureClock:
    """Compares capture times with the time that really passed."""

    def __init__(self) -> None:
        self._before: tuple[int, int] | None = None
        self._stepped = False

    def note(self, capture_time_ns: int) -> None:
        """A frame was captured just now, by its own account at this time; ns since 1970."""
        now_ns = time.monotonic_ns()
        before, self._before = self._before, (capture_time_ns, now_ns)
        if before is None:
            return
        step_s = ((capture_time_ns - before[0]) - (now_ns - before[1])) / 1e9
        stepped, self._stepped = self._stepped, abs(step_s) >= STEP_S
        if stepped or not self._stepped:  # a clock that steps with every frame is told once
            return
        log.warning(
            "the clock of captured frames was set %s by %.1f s; frames go on, with its times",
            *("forward" if step_s > 0 else "back", abs(step_s)),
        )
