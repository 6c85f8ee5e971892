"""Recordings for the page and by URL: when a camera was recorded, and what it saw at any moment."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from decoder.access.addresses import caller_of
from decoder.access.audit import Audit
from decoder.access.roles import WHO
from decoder.admission import Policy, Refusal
from decoder.pictures import encode_jpeg
from decoder.reconstruction import Worker
from decoder.recordings.playback import Moment, NoReconstructorError, Playback, RecordingError
from decoder.viewers.web import NEVER_STORED, asked_rendition, not_given, text
from protos.rules import CAMERA_NAME

_MS = 1_000_000
"""Nanoseconds."""
_MOST_WAITING = 8
"""Requests; more of them, on a disk that hangs, would take all the connections that the server has."""

_T = TypeVar("_T")


def recorded(playback: Playback, worker: Worker, policy: Policy, audit: Audit) -> list[Route]:
    """Routes.

    Recordings are read in a thread of their own, one request after the other: however slow the disk is, and however
    many ask, what is live goes on. A few may wait for their turn, others are told to come again; whoever goes while
    they wait makes room.

    Args:
        policy: which renditions are given.
        audit: is told who is given plain pictures.
    """
    disk, line = ThreadPoolExecutor(1, thread_name_prefix="playback"), _Line()

    async def read(work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(disk, work)

    async def spans(request: Request) -> Response:
        name = request.path_params["name"]
        if refusal := not_given(name):
            return refusal
        found: list[tuple[int, int]] = []
        if CAMERA_NAME.fullmatch(name):
            async with line.turn(request) as refusal:
                if refusal:
                    return refusal
                found = await read(lambda: playback.spans(name))
        # A picture is asked for by whole milliseconds: rounded so that the first and the last one are found.
        told = [{"start_ms": -(-start // _MS), "end_ms": -(-end // _MS)} for start, end in found]
        return JSONResponse({"segments": told}, headers=NEVER_STORED)

    async def still(request: Request) -> Response:
        name, asked = request.path_params["name"], request.query_params.get("at", "")
        if refusal := not_given(name):
            return refusal
        if not (asked.isdecimal() and len(asked) < 15):
            return text(400, f"at: {asked[:40]!r}, expected milliseconds since 1970")
        if not CAMERA_NAME.fullmatch(name):
            return text(404, f"nothing of a camera {name[:80]!r} is recorded here")
        async with line.turn(request) as refusal:
            if refusal:
                return refusal
            made = await picture(request, name, int(asked) * _MS)
        if isinstance(made, Response):
            return made
        moment, pixels = made
        headers = NEVER_STORED | {"X-Time-Ms": str(-(-moment.capture_time_ns // _MS))}
        if moment.next_ns is not None:
            headers["X-Next-Ms"] = str(-(-moment.next_ns // _MS))
        return Response(await asyncio.to_thread(encode_jpeg, pixels), media_type="image/jpeg", headers=headers)

    async def picture(request: Request, name: str, time_ns: int) -> tuple[Moment, NDArray[np.uint8]] | Response:
        try:
            moment = await read(lambda: playback.at(name, time_ns))
        except NoReconstructorError as error:
            return text(404, str(error))
        except RecordingError as error:
            return text(500, str(error))
        if moment is None:
            return text(404, f"nothing of a camera {name[:80]!r} is recorded here")
        try:
            there = worker.admit(moment.hello)
        except Refusal as refusal:
            return text(404, str(refusal))
        rendition = asked_rendition(request, policy, there)
        if isinstance(rendition, Response):
            return rendition
        pixels = await worker.reconstruct(moment.hello, moment.levels, rendition)
        if not WHO.get().holds():
            return text(401, "sign in again")
        if rendition not in WHO.get().renditions(policy):  # they may be given fewer since the engine began
            return text(403, f"rendition: {rendition} pictures are no longer given")
        audit.gave("recording", WHO.get(), caller_of(request), name, rendition, moment.capture_time_ns)
        return moment, pixels

    return [Route("/recordings/{name}.json", spans), Route("/recordings/{name}.jpg", still)]


class _Line:
    """Those who wait for what one at a time is given."""

    def __init__(self) -> None:
        self._lock, self._waiting = asyncio.Lock(), 0

    @asynccontextmanager
    async def turn(self, request: Request) -> AsyncIterator[Response | None]:
        """The turn of whoever asks, or why they don't get one: too many wait, or they have gone."""
        if self._waiting >= _MOST_WAITING:
            told = text(503, "recordings: as many as may wait for the disk are waiting; ask again")
            told.headers["Retry-After"] = "1"
            yield told
            return
        self._waiting += 1
        mine, gone = asyncio.create_task(self._lock.acquire()), asyncio.create_task(_left(request))
        try:
            try:
                await asyncio.wait([mine, gone], return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._waiting -= 1
                gone.cancel()
                mine.cancel()  # nothing, if it's done
            left = not mine.done() or gone.done() or await request.is_disconnected()
            yield Response(status_code=204, headers=NEVER_STORED) if left else None
        finally:
            if mine.done() and not mine.cancelled():
                self._lock.release()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
