"""How many frames are sent: fewer when the server or the way to it can't keep up, and slowly more again.

What is dropped because the way is full has waited there first, behind all that fills it. So before that goes on for
long, fewer frames are sent than the way carries: those that are sent then arrive at once.
"""

import logging
import math
import time
from collections.abc import Callable

log = logging.getLogger("veilcam.encode")

_LOWER, _LONGEST_ASKED_S = 1.25, 1.0
_HALVE, _LONGEST_S = 2.0, 10.0
_EASE, _EASE_EVERY_S = 0.9, 1.0
_FULL_FRAMES, _FULL_S = 4, 1.0
"""The way is full when so many frames in a row, over so long, each had to wait until there was room. After an outage
only the first has to."""
_HELD_S = 10.0
"""A way that carries every frame for so long does so again; before, it may only be filling up."""


class Throttle:
    """Which frames to skip.

    Args:
        name: where they are sent, for people.
        clock: seconds.
    """

    def __init__(self, name: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self._interval_s = 0.0
        self._last = -math.inf
        self._eased = 0.0
        self._seen: tuple[float, int] = (clock(), 0)
        self._waited, self._waited_since = 0, 0.0
        self._told = False
        self._whole_since = 0.0

    def lower(self, frame_rate: float) -> None:
        """The server can't keep up: leave a quarter more time between frames than now, up to a second."""
        wanted = max(self._interval_s, 1 / max(frame_rate, 1.0)) * _LOWER
        self._interval_s = max(self._interval_s, min(_LONGEST_ASKED_S, wanted))
        self._eased = self._clock()

    def sent(self, waited: bool) -> None:
        """A frame was sent: half as many from now on as the way carries, if it is full.

        Args:
            waited: whether it had to wait for room on the way.
        """
        now = self._clock()
        if not waited:
            self._waited = 0
            if self._told and not self._interval_s and now - self._whole_since > _HELD_S:
                self._told = False
                log.info("%s: the way there carries every frame again", self._name)
            return
        self._waited += 1
        if self._waited == 1:
            self._waited_since = now
        if self._waited < _FULL_FRAMES or now - self._waited_since < _FULL_S:
            return
        carried_s = (now - self._waited_since) / (self._waited - 1)
        self._waited = 0
        self._interval_s = min(_LONGEST_S, max(self._interval_s, carried_s) * _HALVE)
        self._eased = now
        if not self._told:
            self._told = True
            log.warning(
                "%s: the way there is full; %.1f frames a second are sent for now, more as it carries more",
                *(self._name, 1 / self._interval_s),
            )

    def admits(self, sequence: int) -> bool:
        """Whether the frame at hand, of this number among those captured, is due."""
        now = self._clock()
        if self._interval_s and now - self._eased > _EASE_EVERY_S:
            self._ease(now, sequence)
        if now - self._last < self._interval_s * 0.95:
            return False
        self._last = now
        return True

    def _ease(self, now: float, sequence: int) -> None:
        """A little less time between frames; none is kept once that is less than there is between those captured."""
        since, first = self._seen
        self._interval_s, self._eased, self._seen = self._interval_s * _EASE, now, (now, sequence)
        if self._interval_s * (sequence - first) < now - since:
            self._interval_s, self._whole_since = 0.0, now
