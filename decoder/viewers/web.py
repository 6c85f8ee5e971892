"""The web page for people: all cameras, a still and an MJPEG stream of each, and what the page tells as JSON."""

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from decoder.cameras import Camera, Cameras
from decoder.catalogue import RENDITIONS, Catalogue
from decoder.pictures import Relay

LOOPBACK = ("127.0.0.1", "localhost")
_PAGE = Path(__file__).parent / "page.html"
_BOUNDARY = "picture"
_LONGEST_WAIT_S = 10.0
_NEVER_STORED = {"Cache-Control": "no-store"}
_LENGTHS = struct.Struct("<II")


def web_app(cameras: Cameras, catalogue: Catalogue, renditions: tuple[str, ...], host: str) -> Starlette:
    """The page and what it is made of. ``?rendition=plain`` works where plain pictures are allowed.

    Bound to loopback, it answers to loopback's names alone: no foreign page that a browser shows can read it by
    pointing a name of its own here.
    """
    names = {each.id: each for each in catalogue.reconstructors}

    def found(request: Request) -> tuple[Camera, Relay] | Response:
        camera = cameras.get(request.path_params["name"])
        if camera is None:
            return PlainTextResponse(f"no camera {request.path_params['name']!r} here\n", 404)
        rendition = request.query_params.get("rendition", camera.rendition)
        if rendition not in RENDITIONS:
            return PlainTextResponse(f"rendition: expected one of {', '.join(RENDITIONS)}\n", 400)
        if rendition not in renditions:
            return PlainTextResponse(f"rendition: this server gives only {', '.join(renditions)} pictures\n", 403)
        return camera, camera.relays[rendition]

    async def page(request: Request) -> Response:
        return FileResponse(_PAGE, headers=_NEVER_STORED)

    async def listing(request: Request) -> Response:
        return JSONResponse([_told(camera, names) for camera in cameras.all()], headers=_NEVER_STORED)

    async def pictures(request: Request) -> Response:
        try:
            seen = json.loads(request.query_params.get("seen", "{}"))
            seen = {str(name): int(serial) for name, serial in seen.items()}
        except (ValueError, TypeError, AttributeError):
            return PlainTextResponse('seen: expected JSON as in {"NAME": 7}\n', 400)
        return await _newer(cameras, seen)

    async def still(request: Request) -> Response:
        match = found(request)
        if isinstance(match, Response):
            return match
        camera, relay = match
        picture = relay.latest
        if relay.on_demand:
            with relay.watch() as watch:
                picture = await _before_long(anext(watch))
        if picture is None:
            return PlainTextResponse(f"camera {camera.name!r} has shown no such picture yet\n", 404)
        headers = _NEVER_STORED | {"X-Sequence": str(picture.sequence)}
        return Response(await picture.jpeg(), media_type="image/jpeg", headers=headers)

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
            Route("/pictures", pictures),
            Route("/cameras/{name}.jpg", still),
            Route("/cameras/{name}.mjpeg", stream),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)] if host in LOOPBACK else [],
    )


async def _newer(cameras: Cameras, seen: dict[str, int]) -> Response:
    """Every camera's newest picture that isn't ``seen`` by its serial number, as soon as there is one; else 204.

    What the page asks for, again and again, with one request for all cameras, since a browser opens few connections
    to a server: a slow browser asks less often and never gets a backlog, and a hidden one doesn't ask.

    The body holds for each picture: u32 length of its JSON, u32 length of its JPEG, JSON (name, serial), JPEG.
    """
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while True:
        changed = asyncio.ensure_future(cameras.changed())
        fresh = [
            (camera.name, relay.serial, relay.latest)
            for camera in cameras.all()
            if (relay := camera.relays[camera.rendition]).latest and relay.serial != seen.get(camera.name)
        ]
        if fresh:
            changed.cancel()
            break
        if await _before_long(changed, deadline - time.monotonic()) is None and time.monotonic() >= deadline:
            return Response(status_code=204, headers=_NEVER_STORED)
    parts: list[bytes] = []
    for name, serial, picture in fresh:
        assert picture is not None
        told, data = json.dumps({"name": name, "serial": serial}).encode(), await picture.jpeg()
        parts += [_LENGTHS.pack(len(told), len(data)), told, data]
    return Response(b"".join(parts), media_type="application/octet-stream", headers=_NEVER_STORED)


async def _before_long(awaited: Any, seconds: float = _LONGEST_WAIT_S) -> Any:
    """What is awaited, or None when it doesn't come in time or there is no more of it."""
    try:
        return await asyncio.wait_for(awaited, max(0.0, seconds))
    except (TimeoutError, StopAsyncIteration):
        return None


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
