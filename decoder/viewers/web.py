"""The web page for people: all cameras, a still and an MJPEG stream of each, and what the page tells as JSON."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from decoder.cameras import Camera, Cameras
from decoder.catalogue import Catalogue
from decoder.pictures import Picture, Relay

_PAGE = Path(__file__).parent / "page.html"
_BOUNDARY = "picture"
_LONGEST_WAIT_S = 10.0
_NEVER_STORED = {"Cache-Control": "no-store"}


def web_app(cameras: Cameras, catalogue: Catalogue, renditions: tuple[str, ...]) -> Starlette:
    """The page and what it is made of. ``?rendition=plain`` works where plain pictures are allowed."""
    names = {each.id: each for each in catalogue.reconstructors}

    def found(request: Request) -> tuple[Camera, Relay] | Response:
        camera = cameras.get(request.path_params["name"])
        if camera is None:
            return PlainTextResponse(f"no camera {request.path_params['name']!r} here\n", 404)
        rendition = request.query_params.get("rendition", renditions[0])
        if rendition not in renditions:
            return PlainTextResponse(f"rendition: this server gives only {', '.join(renditions)} pictures\n", 403)
        return camera, camera.relays[rendition]

    async def page(request: Request) -> Response:
        return FileResponse(_PAGE, headers=_NEVER_STORED)

    async def listing(request: Request) -> Response:
        return JSONResponse([_told(camera, names) for camera in cameras.all()], headers=_NEVER_STORED)

    async def still(request: Request) -> Response:
        match = found(request)
        if isinstance(match, Response):
            return match
        camera, relay = match
        if "after" in request.query_params:
            return await _newer(relay, request.query_params["after"])
        if relay.latest is None:
            return PlainTextResponse(f"camera {camera.name!r} has shown no such picture yet\n", 404)
        return await _jpeg(relay.serial, relay.latest)

    async def stream(request: Request) -> Response:
        match = found(request)
        if isinstance(match, Response):
            return match
        media_type = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
        return StreamingResponse(_parts(match[1]), media_type=media_type, headers=_NEVER_STORED)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/cameras.json", listing),
            Route("/cameras/{name}.jpg", still),
            Route("/cameras/{name}.mjpeg", stream),
        ]
    )


async def _newer(relay: Relay, after: str) -> Response:
    """The newest picture as soon as there is one after serial number ``after``; 204 when none comes for a while.

    What the page asks for, again and again: a slow browser asks less often, and a hidden one not at all.
    """
    if not after.isdecimal() or len(after) > 18:
        return PlainTextResponse(f"after: {after[:80]!r}, expected a picture's serial number\n", 400)
    seen = int(after) if int(after) <= relay.serial else 0
    try:
        with relay.watch():
            found = await asyncio.wait_for(relay.next(seen), _LONGEST_WAIT_S)
    except TimeoutError:
        return Response(status_code=204, headers=_NEVER_STORED)
    return await _jpeg(*found) if found else PlainTextResponse("this camera is gone\n", 503)


async def _jpeg(serial: int, picture: Picture) -> Response:
    headers = _NEVER_STORED | {"X-Serial": str(serial), "X-Sequence": str(picture.sequence)}
    return Response(await picture.jpeg(), media_type="image/jpeg", headers=headers)


async def _parts(relay: Relay) -> AsyncIterator[bytes]:
    # A browser shows a part once the boundary after it has come: each part ends with it, and doesn't wait for the next.
    boundary = f"--{_BOUNDARY}\r\n".encode()
    yield boundary
    with relay.watch() as pictures:
        async for picture in pictures:
            data = await picture.jpeg()
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            yield head + data + b"\r\n" + boundary


def _told(camera: Camera, names: dict[str, Any]) -> dict[str, Any]:
    latest = camera.latest
    reconstructor = names.get(latest.reconstructor_id) if latest else None
    return {
        "name": camera.name,
        "state": camera.state,
        "silent_s": round(time.monotonic() - camera.last_seen, 1),
        "fps": round(camera.frame_rate(), 1),
        "latency_ms": round((latest.shown_time_ns - latest.capture_time_ns) / 1e6, 1) if latest else None,
        "sequence": latest.sequence if latest else 0,
        "size": [latest.pixels.shape[1], latest.pixels.shape[0]] if latest else None,
        "reconstructor": f"{reconstructor.name} ({reconstructor.rendition})" if reconstructor else None,
    }
