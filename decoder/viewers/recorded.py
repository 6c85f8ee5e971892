"""Recordings for the page and by URL: when a camera was recorded, and what it saw at any moment."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from decoder.admission import Policy
from decoder.pictures import encode_jpeg
from decoder.reconstruction import Worker
from decoder.recordings.playback import Moment, NoReconstructorError, Playback, RecordingError
from decoder.viewers.web import NEVER_STORED, asked_rendition, text
from protos.rules import CAMERA_NAME

_MS = 1_000_000
"""Nanoseconds."""

_T = TypeVar("_T")


def recorded(playback: Playback, worker: Worker, policy: Policy) -> list[Route]:
    """Routes.

    Recordings are read in a thread of their own, one request after the other: however slow the disk is, and however
    many ask, what is live goes on. Whoever has gone when their turn comes costs nothing.

    Args:
        policy: which renditions are given.
    """
    disk, turn = ThreadPoolExecutor(1, thread_name_prefix="playback"), asyncio.Lock()

    async def read(work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(disk, work)

    async def spans(request: Request) -> Response:
        name = request.path_params["name"]
        async with turn:
            gone = await request.is_disconnected()
            found = await read(lambda: playback.spans(name)) if CAMERA_NAME.fullmatch(name) and not gone else []
        # A picture is asked for by whole milliseconds: rounded so that the first and the last one are found.
        told = [{"start_ms": -(-start // _MS), "end_ms": -(-end // _MS)} for start, end in found]
        return JSONResponse({"segments": told}, headers=NEVER_STORED)

    async def still(request: Request) -> Response:
        name, asked = request.path_params["name"], request.query_params.get("at", "")
        if not (asked.isdecimal() and len(asked) < 15):
            return text(400, f"at: {asked[:40]!r}, expected milliseconds since 1970")
        if not CAMERA_NAME.fullmatch(name):
            return text(404, f"nothing of a camera {name[:80]!r} is recorded here")
        async with turn:
            if await request.is_disconnected():
                return Response(status_code=204, headers=NEVER_STORED)
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
        there = worker.renditions_for(moment.hello.operator_id)
        rendition = asked_rendition(request, policy.renditions, there)
        if isinstance(rendition, Response):
            return rendition
        return moment, await worker.reconstruct(moment.hello, moment.levels, rendition)

    return [Route("/recordings/{name}.json", spans), Route("/recordings/{name}.jpg", still)]
