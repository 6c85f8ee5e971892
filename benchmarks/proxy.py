"""A bad network on purpose: a TCP proxy that is slow, narrow, cut, reset in mid-message, half-open or a black hole."""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

_T = TypeVar("_T")

_CHUNK = 1400
"""Bytes handed on at once, about a packet."""
_HELD_CHUNKS = 24
"""On the way in one direction while nothing slows it down; what a router keeps for a line that is slower."""
_RESENT_S = 0.2
"""The shortest time after which Linux sends again what wasn't acknowledged."""
_BUFFER = 1 << 14
"""Bytes that the system keeps for a connection here: much more would hide how narrow the way is."""
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Hands bytes on between whoever connects and one address, from a thread of its own. Use it as a context.

    Args:
        target: ``HOST:PORT``.
        host: to listen on.

    Attributes:
        delay_s: what each byte takes, in each direction.
        bits_per_s: what a connection carries in each direction; 0 for no limit.
        loss: share of packets that are late, as TCP makes it look when they were lost: by a time-out.
    """

    def __init__(self, target: str, host: str = "127.0.0.1") -> None:
        self.delay_s, self.bits_per_s, self.loss = 0.0, 0.0, 0.0
        self._host, self._target = host, target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._open = asyncio.Event()
        self._open.set()
        self._black_hole = False
        self._ways: set[_Way] = set()
        self.port = 0

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._server = self._call(self._listen())
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        return f"{self._host}:{self.port}"

    def cut(self) -> None:
        """Hand nothing on, of no connection, until ``mend``."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def mend(self) -> None:
        """Go on with whatever connections are still there."""
        self._loop.call_soon_threadsafe(self._open.set)

    def reset(self) -> None:
        """Break all connections with a reset, each as soon as half of what comes next was handed on."""
        self._call(self._mark("half"))

    def vanish(self) -> None:
        """Hand nothing on any more of the connections that there are, and leave them open; new ones are sound."""
        self._call(self._mark("lost"))

    def black_hole(self, on: bool) -> None:
        """Reset all connections; take new ones and never answer them, until it is off."""
        self._black_hole = on
        self._call(self._mark("reset"))

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        listening = socket.create_server((self._host, 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        # A packet that is larger than what is kept here would never go out whole, and Linux gives the connection up.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _CHUNK)
        return await asyncio.start_server(self._connected, sock=listening, limit=_BUFFER)

    async def _close(self) -> None:
        self._server.close()
        for way in list(self._ways):
            way.reset()
        await asyncio.gather(*[way.over for way in self._ways])

    async def _mark(self, what: str) -> None:
        for way in list(self._ways):
            if what == "reset":
                way.reset()
            else:
                way.fate = what

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        way = _Way(writer)
        self._ways.add(way)
        try:
            if self._black_hole:
                way.fate = "lost"
                await way.over
                return
            host, port = self._target.rsplit(":", 1)
            there = await asyncio.open_connection(host, int(port), limit=_BUFFER)
            way.writers.append(there[1])
            both = [self._carry(way, reader, there[1]), self._carry(way, there[0], writer)]
            tasks = [asyncio.create_task(each) for each in both]
            # Whatever ends first: both directions, or the connection.
            way.over.add_done_callback(lambda _: [task.cancel() for task in tasks])
            await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            pass  # there is nobody: this side hears of it by the reset below
        finally:
            way.reset()
            self._ways.discard(way)

    async def _carry(self, way: "_Way", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction: read into a short queue, hand on what is due."""
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_HELD_CHUNKS)
        reading = asyncio.create_task(self._read(reader, held))
        try:
            while True:
                came, data = await held.get()
                await asyncio.sleep(max(0.0, came + self.delay_s - self._loop.time()))
                if self.bits_per_s:
                    await asyncio.sleep(len(data) * 8 / self.bits_per_s)
                if random.random() < self.loss:  # noqa: S311 - bad luck, no secret
                    await asyncio.sleep(_RESENT_S)
                await self._open.wait()
                if way.fate == "lost":
                    await way.over
                if way.fate == "half":
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    way.reset()
                    return
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the other side is gone, and so is this
        finally:
            reading.cancel()

    async def _read(self, reader: asyncio.StreamReader, held: "asyncio.Queue[tuple[float, bytes]]") -> None:
        data = b" "
        while data:
            try:
                data = await reader.read(_CHUNK)
            except OSError:
                data = b""
            await held.put((self._loop.time(), data))


class _Way:
    """One connection through the proxy.

    Attributes:
        fate: ``half``: reset in the next message; ``lost``: nothing of it arrives any more.
        over: done once it is reset.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.fate = ""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def reset(self) -> None:
        """End both sides with a reset, whatever is on the way."""
        for writer in self.writers:
            with contextlib.suppress(OSError):  # closed already
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        if not self.over.done():
            self.over.set_result(None)
