"""What a spool has dropped, told to people: how many frames, captured from when to when, and why."""

import logging
import time
from datetime import datetime
from pathlib import Path

log = logging.getLogger("veilcam.encode")

_EVERY_S = 60.0
"""Frames that are dropped are told at once, and then no more often."""


class Drops:
    """Frames that were dropped and that people haven't been told of."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._untold: dict[str, tuple[int, int, int]] = {}
        self._told = -_EVERY_S

    def add(self, why: str, count: int, first_ns: int, last_ns: int) -> None:
        """Frames that are gone now, and when the first and the last were captured, in ns since 1970."""
        if count:
            before, since, until = self._untold.get(why, (0, first_ns, last_ns))
            self._untold[why] = before + count, min(since, first_ns), max(until, last_ns)

    def tell(self, at_once: bool = False) -> None:
        """One line for each reason, unless there was one a moment ago."""
        now = time.monotonic()
        if not self._untold or not (at_once or now - self._told >= _EVERY_S):
            return
        for why, (count, first_ns, last_ns) in self._untold.items():
            log.warning(
                "spool %s: frames dropped: %d, captured from %s to %s: %s",
                *(self._folder, count, _told_time(first_ns), _told_time(last_ns), why),
            )
        self._untold.clear()
        self._told = now


def _told_time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9).astimezone().isoformat(" ", "seconds")
