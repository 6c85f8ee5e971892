"""The page's connections: how many are open, of whom, and how long one may take to say what it wants."""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from decoder.access.addresses import network_of, unmapped
from decoder.seldom import Seldom

log = logging.getLogger("veilcam.decode")


class Listener(socket.socket):
    """A listening socket that closes what comes above its limits, before TLS or anything else is done for it.

    Args:
        listening: taken over.
        most: connections open at one time.
        most_of_one: of one address.
        exempt: an address that speaks for many, to which that limit doesn't apply.
    """

    def __init__(self, listening: socket.socket, most: int, most_of_one: int, exempt: str | None = None) -> None:
        super().__init__(fileno=listening.detach())
        self._most, self._most_of_one = most, most_of_one
        self._exempt = network_of(exempt) if exempt is not None else None
        self._open: Counter[str] = Counter()
        self._tell = Seldom()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that there is room for; BlockingIOError if none waits."""
        while True:
            made, address = super().accept()
            caller = network_of(address[0])
            if problem := self._problem(caller):
                made.close()
                if self._tell.now():
                    log.warning("page: connections are refused: %s", problem)
                continue
            self._open[caller] += 1
            return _Connection(made, lambda caller=caller: self._left(caller)), address  # type: ignore[misc]

    def _problem(self, caller: str) -> str:
        if self._open.total() >= self._most:
            return f"{self._most} are open (max_http)"
        if caller != self._exempt and self._open[caller] >= self._most_of_one:
            return f"{self._most_of_one} are open from {caller} (max_peer_streams)"
        return ""

    def _left(self, caller: str) -> None:
        self._open[caller] -= 1
        self._open += Counter()  # those at 0 go


class _Connection(socket.socket):
    """One that says when it is closed, by whoever has it by then."""

    def __init__(self, made: socket.socket, closed: Callable[[], None]) -> None:
        super().__init__(fileno=made.detach())
        self._tell_closed: Callable[[], None] | None = closed

    def close(self) -> None:
        super().close()
        tell, self._tell_closed = self._tell_closed, None
        if tell is not None:
            tell()


def page_protocol(request_s: float) -> type[H11Protocol]:
    """Uvicorn's protocol, but that a request must have come as a whole, head and body, within ``request_s`` seconds."""

    class PageProtocol(H11Protocol):
        _due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if self.client is not None:  # for whoever asks for it, as whether it is the trusted proxy
                self.client = unmapped(self.client[0]), self.client[1]
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                self._expect()
            else:
                self._stop_expecting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:  # of a request that came behind the one that was just answered
                self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_expecting()
            super().connection_lost(exc)

        def _expect(self) -> None:
            """The time begins with the first byte, and no later byte makes it longer."""
            if self._due is None:
                self._due = self.loop.call_later(request_s, self.transport.abort)

        def _stop_expecting(self) -> None:
            if self._due is not None:
                self._due.cancel()
                self._due = None

    return PageProtocol
