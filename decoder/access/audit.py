"""Who was given plain pictures of which camera, and when: a line for the first, then one a minute for all the others.

What leaves by a command or onto the disk goes to the user of this machine who runs it, ``os:NAME``.
"""

import asyncio
import getpass
import logging
import os
import time
from dataclasses import dataclass
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


@dataclass
class _Given:
    """Since the last line."""

    who: Who
    at: float
    count: int = 0
    first_ns: int = 0
    last_ns: int = 0


class Audit:
    """Of all ways out of a server. No picture stays untold.

    ``keep_telling`` tells what no other picture follows, ``close`` the rest.
    """

    def __init__(self) -> None:
        self._given: dict[tuple[str, str, str, str], _Given] = {}

    def gave(self, way: str, who: Who, address: str, camera: str, rendition: str, capture_time_ns: int) -> None:
        """A picture is about to leave.

        Args:
            way: as the line tells it.
        """
        if rendition != "plain":
            return
        key = who.name, address, camera, way
        self._tell_due(key)
        given = self._given.get(key)
        if given is None:
            while len(self._given) >= _MOST:
                self._tell(next(iter(self._given)))
            self._given[key] = _Given(who, time.monotonic())
            _log(key, who, "plain picture", _told(capture_time_ns))
            return
        earlier, later = (given.first_ns, given.last_ns) if given.count else (capture_time_ns, capture_time_ns)
        given.first_ns, given.last_ns = min(earlier, capture_time_ns), max(later, capture_time_ns)
        given.count += 1

    async def keep_telling(self) -> None:
        """Tell what was given by someone's last look, until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S / 4)
            for key in list(self._given):
                self._tell_due(key)

    def close(self) -> None:
        """Tell all that wasn't told yet."""
        for key in list(self._given):
            self._tell(key)

    def _tell_due(self, key: tuple[str, str, str, str]) -> None:
        given = self._given.get(key)
        if given is not None and time.monotonic() - given.at >= EVERY_S:
            self._tell(key)
            if given.count:  # it goes on: all that comes is told in a minute
                self._given[key] = _Given(given.who, time.monotonic())

    def _tell(self, key: tuple[str, str, str, str]) -> None:
        given = self._given.pop(key)
        if given.count:
            what = f"{given.count} more plain picture{'s' if given.count > 1 else ''}"
            _log(key, given.who, what, f"{_told(given.first_ns)} to {_told(given.last_ns)}", given.count)


def _log(key: tuple[str, str, str, str], who: Who, what: str, captured: str, count: int = 1) -> None:
    name, address, camera, way = key
    log.info(
        "%s of camera %s, captured %s, given to %s (%s) at %s by %s",
        *(what, camera, captured, name, who.role, address, way),
        extra={"camera": camera, "user": name, "address": address, "captured": captured, "pictures": count},
    )


def _told(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="milliseconds")
