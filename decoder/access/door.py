"""Who is at the door: by session, token or certificate; and how often one may try."""

import asyncio
import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from decoder.access.addresses import network_of
from decoder.access.keys import PROGRAM
from decoder.access.people import LONGEST_PASSWORD, People, Person, right_password
from decoder.access.roles import NOBODY, Role, Who

log = logging.getLogger("veilcam.audit")

SESSION_S = 12 * 3600.0
"""From signing in until one has to again."""
TRY_WINDOW_S = 600.0
TRIES_BY_ADDRESS = 10
TRIES_BY_NAME = 30
"""More than by address: a stranger can keep the owner of a name out only from several addresses."""
_MOST_SESSIONS = 10_000
_MOST_TRIED = 10_000
_AT_ONCE = 2
"""Passwords looked at: each takes 64 MiB."""


class TooManyTriesError(Exception):
    """Wrong passwords, too many of late.

    Attributes:
        seconds: until another try is looked at.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too many wrong passwords; again in {seconds:.0f} s")
        self.seconds = seconds


@dataclass(frozen=True)
class _Session:
    name: str
    password: str | None
    until: float


class Door:
    """Tells who someone is. All that is remembered is in memory: after a restart people sign in again."""

    def __init__(self, people: People) -> None:
        self._people = people
        self._sessions: dict[str, _Session] = {}
        self._tried: dict[str, deque[float]] = {}
        self._looking = asyncio.Semaphore(_AT_ONCE)

    def by_token(self, token: str) -> Who:
        """Of a program, or of a person's own."""
        person = self._people.by_token(token)
        return self._who(person) if person is not None else NOBODY

    def by_certificate(self, names: Sequence[str]) -> Who:
        """Of a camera, or of a program that is a user by that name. The names were checked with the certificate."""
        for name in names:
            if name.startswith(PROGRAM):
                person = self._people.get(name.removeprefix(PROGRAM))
                return self._who(person) if person is not None else NOBODY
        return Who(names[0], Role.CAMERA) if names else NOBODY

    def by_session(self, cookie: str) -> Who:
        """Of a person who signed in on the page, and whose password hasn't changed since."""
        key = _kept(cookie)

        def now() -> Person | None:
            session = self._sessions.get(key)
            if session is None or session.until < time.monotonic():
                self._sessions.pop(key, None)
                return None
            person = self._people.get(session.name)
            return person if person is not None and person.password == session.password else None

        person = now()
        if person is None:
            return NOBODY
        return Who(person.name, person.role, person.seen, lambda: now() == person)

    async def sign_in(self, name: str, password: str, address: str) -> str | None:
        """A new session's cookie, or None if name or password is wrong.

        Raises:
            TooManyTriesError: the password wasn't looked at.
        """
        tried = [self._try(f"from {network_of(address)}", TRIES_BY_ADDRESS), self._try(f"as {name}", TRIES_BY_NAME)]
        person = self._people.get(name)
        async with self._looking:
            right = await asyncio.to_thread(right_password, person, password[: LONGEST_PASSWORD + 1])
        if not right or person is None:
            log.warning("wrong name or password for %r from %s", name[:80], address)
            return None
        for times in tried:
            if times:  # while many waited, the window may have passed over it
                times.pop()
        cookie = secrets.token_urlsafe(32)
        while len(self._sessions) >= _MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[_kept(cookie)] = _Session(person.name, person.password, time.monotonic() + SESSION_S)
        log.info("%s (%s) signed in from %s", person.name, person.role, address)
        return cookie

    def sign_out(self, cookie: str) -> None:
        self._sessions.pop(_kept(cookie), None)

    def _try(self, key: str, most: int) -> "deque[float]":
        """Count a try before it is looked at: of many at one time, no more than ``most`` are."""
        now = time.monotonic()
        while len(self._tried) >= _MOST_TRIED and key not in self._tried:
            del self._tried[next(iter(self._tried))]
        times = self._tried.setdefault(key, deque())
        while times and now - times[0] > TRY_WINDOW_S:
            times.popleft()
        if len(times) >= most:
            raise TooManyTriesError(max(1.0, times[0] + TRY_WINDOW_S - now))
        times.append(now)
        return times

    def _who(self, person: Person) -> Who:
        return Who(person.name, person.role, person.seen, lambda: self._people.get(person.name) == person)


def _kept(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()
