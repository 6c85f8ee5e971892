"""Recordings for the page and by URL: when a camera was recorded, and what it saw at any moment."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from decoder.admission import Policy
from decoder.pictures import encode_jpeg
from decoder.reconstruction import Worker
from decoder.recordings.playback import Playback, RecordingError
from decoder.viewers.web import NEVER_STORED, asked_rendition, text
from protos.rules import CAMERA_NAME

_MS = 1_000_000
"""Nanoseconds."""


def recorded(playback: Playback, worker: Worker, policy: Policy) -> list[Route]:
    """Routes.

    Args:
        policy: which renditions are given.
    """

    async def spans(request: Request) -> Response:
        name = request.path_params["name"]
        found = await asyncio.to_thread(playback.spans, name) if CAMERA_NAME.fullmatch(name) else []
        # A picture is asked for by whole milliseconds: rounded so that the first and the last one are found.
        told = [{"start_ms": -(-start // _MS), "end_ms": -(-end // _MS)} for start, end in found]
        return JSONResponse({"segments": told}, headers=NEVER_STORED)

    async def still(request: Request) -> Response:
        name, asked = request.path_params["name"], request.query_params.get("at", "")
        if not (asked.isdecimal() and len(asked) < 15):
            return text(400, f"at: {asked[:40]!r}, expected milliseconds since 1970")
        try:
            named = CAMERA_NAME.fullmatch(name)
            moment = await asyncio.to_thread(playback.at, name, int(asked) * _MS) if named else None
        except RecordingError as error:
            return text(500, str(error))
        if moment is None:
            return text(404, f"nothing of a camera {name[:80]!r} is recorded here")
        there = worker.renditions_for(moment.hello.operator_id)
        if not there:
            return text(404, "only plain reconstructors for this recording here")
        rendition = asked_rendition(request, policy.renditions, there)
        if isinstance(rendition, Response):
            return rendition
        pixels = await worker.reconstruct(moment.hello, moment.levels, rendition)
        headers = NEVER_STORED | {"X-Time-Ms": str(-(-moment.capture_time_ns // _MS))}
        if moment.next_ns is not None:
            headers["X-Next-Ms"] = str(-(-moment.next_ns // _MS))
        return Response(await asyncio.to_thread(encode_jpeg, pixels), media_type="image/jpeg", headers=headers)

    return [Route("/recordings/{name}.json", spans), Route("/recordings/{name}.jpg", still)]
