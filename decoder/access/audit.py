"""Who was given plain pictures of which camera, and when: a line for the first, then one a minute."""

import logging
import time
from datetime import UTC, datetime

from decoder.access.roles import Who

log = logging.getLogger("veilcam.audit")

EVERY_S = 60.0
_MOST = 10_000


class Audit:
    """Of one way out.

    Args:
        way: as the line tells it.
    """

    def __init__(self, way: str) -> None:
        self._way = way
        self._last: dict[tuple[str, str, str], tuple[float, int]] = {}

    def gave(self, who: Who, address: str, camera: str, rendition: str, capture_time_ns: int) -> None:
        """A picture is about to leave."""
        if rendition != "plain":
            return
        key, now = (who.name, address, camera), time.monotonic()
        at, since = self._last.get(key, (-EVERY_S, 0))
        if now - at < EVERY_S:
            self._last[key] = at, since + 1
            return
        while len(self._last) >= _MOST:
            del self._last[next(iter(self._last))]
        self._last[key] = now, 0
        captured = datetime.fromtimestamp(capture_time_ns / 1e9, UTC).isoformat(timespec="milliseconds")
        more = f", and {since} since the last line" if since else ""
        log.info(
            "plain picture of camera %s, captured %s, given to %s (%s) at %s by %s%s",
            *(camera, captured, who.name, who.role, address, self._way, more),
            extra={"camera": camera, "user": who.name, "address": address, "captured": captured},
        )
