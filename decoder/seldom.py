"""What others can bring about as often as they like is told once a minute at most: a log is no place to flood."""

import time

_EVERY_S = 60.0


class Seldom:
    """Of one kind of thing to tell."""

    def __init__(self) -> None:
        self._told = -_EVERY_S

    def now(self) -> bool:
        """Whether to tell it now; after a yes, not again for a minute."""
        now = time.monotonic()
        if now - self._told <= _EVERY_S:
            return False
        self._told = now
        return True
