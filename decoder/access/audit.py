"""Who was given plain pictures of which camera, and when: a line for the first, then one a minute.

What leaves by a command or onto the disk goes to the user of this machine who runs it, ``os:NAME``.
"""

import getpass
import logging
import os
import time
from datetime import UTC, datetime

from decoder.access.roles import Role, Who

log = logging.getLogger("veilcam.audit")

EVERY_S = 60.0
_MOST = 10_000


HERE = "this machine"


def os_user() -> Who:
    """Whoever runs this process."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in a container
        name = str(os.getuid())
    return Who(f"os:{name}", Role.ADMIN, None)


def made(way: str, camera: str, first_ns: int, last_ns: int) -> None:
    """A command is about to make plain pictures of a recording, captured from the first time to the last."""
    who, (first, last) = os_user(), (_told(time_ns) for time_ns in (first_ns, last_ns))
    log.info(
        "plain pictures of camera %s, captured %s to %s, given to %s at %s by %s",
        *(camera, first, last, who.name, HERE, way),
        extra={"camera": camera, "user": who.name, "address": HERE, "captured": first},
    )


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
        captured = _told(capture_time_ns)
        more = f", and {since} since the last line" if since else ""
        log.info(
            "plain picture of camera %s, captured %s, given to %s (%s) at %s by %s%s",
            *(camera, captured, who.name, who.role, address, self._way, more),
            extra={"camera": camera, "user": who.name, "address": address, "captured": captured},
        )


def _told(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="milliseconds")
