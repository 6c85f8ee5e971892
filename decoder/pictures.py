"""Pictures on their way to viewers: one picture, and the relay that gives the newest to any number of them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

LINGER_S = 1.5
"""How long the place is kept of someone who asks again and again: longer than a page takes to show what it got."""
JPEG_QUALITY = 75
"""The lowest quality at which the shipped veils were measured; a higher one would only cost more bytes."""


@dataclass(eq=False)
class Times:
    """What one picture took on the server, in milliseconds; ns since 1970 where the name says so."""

    received_ns: int
    unpack: float
    queue: float = 0.0
    reconstruct: float = 0.0
    encode: float = 0.0


@dataclass(eq=False)
class Picture:
    """One reconstructed picture: uint8 (H, W), and where it came from."""

    camera: str
    sequence: int
    capture_time_ns: int
    shown_time_ns: int
    pixels: NDArray[np.uint8]
    rendition: str
    reconstructor_id: str
    times: Times
    _jpeg: "asyncio.Task[bytes] | None" = field(default=None, repr=False)

    async def jpeg(self) -> bytes:
        """The picture as a JPEG file, encoded once however many ask."""
        if self._jpeg is None:
            self._jpeg = asyncio.create_task(asyncio.to_thread(self._encode))
        return await asyncio.shield(self._jpeg)

    def _encode(self) -> bytes:
        start = time.perf_counter()
        data = encode_jpeg(self.pixels)
        self.times.encode = (time.perf_counter() - start) * 1e3
        return data


def encode_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG file of gray pixels (H, W), at the quality at which veils were measured."""
    encoded, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not encoded:
        raise ValueError(f"OpenCV can't encode a picture of {pixels.shape} as JPEG")
    return data.tobytes()


class Relay:
    """One rendition of one camera. Viewers that are slow miss pictures; they never hold any back.

    Pictures are made while there is a viewer. One who comes when there was none isn't shown what was made long ago, but
    waits for the newest.

    Args:
        joined: called with each viewer who comes or goes.
    """

    def __init__(self, joined: Callable[[], None] = lambda: None) -> None:
        self.latest: Picture | None = None
        self._joined = joined
        self._places = 0
        self._lingering: asyncio.TimerHandle | None = None
        self._serial = 0
        self._closed = False
        self._changed = asyncio.Event()

    def publish(self, picture: Picture) -> None:
        """Give a picture to everyone who waits."""
        self.latest = picture
        self._serial += 1
        self._wake()

    def close(self) -> None:
        """Tell everyone who waits that no more pictures come."""
        self._closed = True
        self._wake()

    def forget(self) -> None:
        """The picture is no longer what the camera sees."""
        self.latest = None

    def watch(self) -> "Watch":
        """A viewer's place. Use it as a context."""
        return Watch(self)

    async def next(self, after: int) -> tuple[int, Picture] | None:
        """The newest picture after serial number ``after``, or None once closed."""
        while (self._serial == after or self.latest is None) and not self._closed:
            await self._changed.wait()
        if self._serial == after or self.latest is None:
            return None
        return self._serial, self.latest

    @property
    def serial(self) -> int:
        """How many pictures were published."""
        return self._serial

    @property
    def viewers(self) -> int:
        """Who watches; one at least while someone may be about to ask again."""
        return max(self._places, int(self._lingering is not None))

    def enter(self) -> None:
        """One viewer more."""
        self._places += 1
        self._joined()

    def leave(self) -> None:
        """One viewer fewer."""
        self._places -= 1
        self._joined()

    def linger(self) -> None:
        """Someone leaves who will ask again: for a little while, that is no gap."""
        if self._lingering is not None:
            self._lingering.cancel()
        self._lingering = asyncio.get_running_loop().call_later(LINGER_S, self._gone)

    def _gone(self) -> None:
        self._lingering = None
        self._joined()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Watch:
    """An iterator over the newest pictures of a relay, counted among its viewers while it is open."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._seen = 0

    def __enter__(self) -> "Watch":
        self._relay.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self._relay.leave()

    def __aiter__(self) -> "Watch":
        return self

    async def __anext__(self) -> Picture:
        found = await self._relay.next(self._seen)
        if found is None:
            raise StopAsyncIteration
        self._seen, picture = found
        return picture
