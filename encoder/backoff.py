"""Trying for ever: how long to wait between tries, and what was said of an outage already."""

import random
import time
from dataclasses import dataclass, field
from datetime import datetime

REFUSED_WAIT_S = 60.0
"""Between tries of what the server refused for a reason that only a person can remove, there or here."""


class Backoff:
    """Waits that double from try to try up to a cap, each shortened at random by up to half.

    The chance keeps cameras that lost one server together from all coming back to it in the same moment.

    Args:
        first: seconds before the first try, at most.
        cap: seconds between tries, at most.
    """

    def __init__(self, first: float = 0.5, cap: float = 30.0) -> None:
        self._first, self._cap = first, cap
        self._next = first

    def wait(self) -> float:
        """Seconds to wait before the next try."""
        longest, self._next = self._next, min(self._next * 2, self._cap)
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing

    def reset(self) -> None:
        """What was tried has held: the next wait is short again."""
        self._next = self._first


@dataclass
class Outage:
    """From when on something is away, and what was told of it.

    Attributes:
        since: date and time, for people.
    """

    since: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(" ", "seconds"))
    _began: float = field(default_factory=time.monotonic)
    _told: set[str] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return self.until(time.monotonic())

    def until(self, moment: float) -> float:
        """Seconds that it had lasted at a moment of the monotonic clock."""
        return max(0.0, moment - self._began)

    def is_news(self, reason: str) -> bool:
        """Whether this reason is to be told: each is, once."""
        new = reason not in self._told
        self._told.add(reason)
        return new
