"""The web page for people, and the same by URL for other tools: JSON, stills, MJPEG."""

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from decoder.access.addresses import caller_of
from decoder.access.audit import Audit
from decoder.access.door import Door
from decoder.access.exposure import is_loopback
from decoder.access.guards import SafeHeaders, WebGuard
from decoder.access.login import cookie_name, login
from decoder.access.roles import WHO
from decoder.admission import Policy
from decoder.cameras import Camera, Cameras
from decoder.catalogue import Catalogue, Reconstructor
from decoder.engines import EngineError
from decoder.model import RENDITIONS
from decoder.pictures import Picture, Relay

_PAGE = Path(__file__).parent / "page.html"
_BOUNDARY = "picture"
_LONGEST_WAIT_S = 10.0
_LOOK_EVERY_S = 0.5
"""Whether whoever asked for pictures is still there."""
NEVER_STORED = {"Cache-Control": "no-store"}
_STRICT_S = 30 * 24 * 3600
"""For which a browser remembers that this host speaks TLS. It remembers it of the host, whatever the port."""
_LENGTHS = struct.Struct("<II")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "[")
"""As a browser names it. Starlettes that don't know IPv6 see its bracket alone, with which no foreign name begins."""


def web_app(
    cameras: Cameras,
    catalogue: Catalogue,
    policy: Policy,
    more: Sequence[Route],
    host: str,
    audit: Audit,
    door: Door | None = None,
    secure: bool = False,
    proxied: bool = False,
) -> Starlette:
    """The page and what it is made of. ``?rendition=plain`` works where plain pictures are allowed.

    Bound to loopback, it answers to loopback's names alone: no foreign page that a browser shows can read it by
    pointing a name of its own here.

    Args:
        policy: which renditions are given.
        more: what else stands at this address.
        host: that it is bound to.
        audit: is told who is given plain pictures.
        door: who someone is who asks; without one, everyone is let in.
        secure: TLS is spoken.
        proxied: a reverse proxy stands before it, which people reach by another name. There is a door then, whose
            cookie no foreign page gets by pointing a name here.
    """

    def found(request: Request) -> tuple[Camera, Relay] | Response:
        if refusal := not_given(request.path_params["name"]):
            return refusal
        camera = cameras.get(request.path_params["name"])
        if camera is None or not camera.came:
            return text(404, f"no camera {request.path_params['name']!r} here")
        rendition = asked_rendition(request, policy, camera.renditions)
        if isinstance(rendition, Response):
            return rendition
        return camera, camera.relays[rendition]

    async def page(request: Request) -> Response:
        return FileResponse(_PAGE, headers=NEVER_STORED)

    async def listing(request: Request) -> Response:
        known = {each.id for each in catalogue.reconstructors}
        who = WHO.get()
        given = who.renditions(policy)
        told = [_told(camera, known, given) for camera in cameras.all() if who.sees(camera.name)]
        return JSONResponse(told, headers=NEVER_STORED | ({"X-User": who.name} if door is not None else {}))

    async def reconstructors(request: Request) -> Response:
        return JSONResponse([_measured(each) for each in catalogue.reconstructors], headers=NEVER_STORED)

    async def pictures(request: Request) -> Response:
        try:
            seen = json.loads(request.query_params.get("seen", "{}"))
            seen = {str(name): int(serial) for name, serial in seen.items()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return text(400, 'seen: expected JSON as in {"NAME": 7}')
        rendition = asked_rendition(request, policy, RENDITIONS)
        if isinstance(rendition, Response):
            return rendition
        return await _newer(request, cameras, policy, rendition, seen, request.query_params.getlist("camera"), audit)

    async def still(request: Request) -> Response:
        match = found(request)
        if isinstance(match, Response):
            return match
        camera, relay = match
        with relay.watch() as watch:
            picture = await _before_long(anext(watch))
        if picture is None:
            return text(404, f"camera {camera.name!r} has shown no such picture yet")
        if not WHO.get().holds():
            return text(401, "sign in again")
        give(audit, "still", request, picture)
        headers = NEVER_STORED | {"X-Sequence": str(picture.sequence)}
        return Response(await picture.jpeg(), media_type="image/jpeg", headers=headers)

    async def stream(request: Request) -> Response:
        match = found(request)
        if isinstance(match, Response):
            return match
        media_type = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
        return StreamingResponse(_parts(match[1], request, audit), media_type=media_type, headers=NEVER_STORED)

    routes = [
        Route("/", page),
        Route("/cameras.json", listing),
        Route("/reconstructors.json", reconstructors),
        Route("/pictures", pictures),
        Route("/cameras/{name}.jpg", still),
        Route("/cameras/{name}.mjpeg", stream),
        *more,
        *(login(door, secure) if door is not None else []),
    ]
    # What else a developer's own machine serves on other ports may speak no TLS.
    middleware = [Middleware(SafeHeaders, strict=_STRICT_S if secure and not is_loopback(host) else 0)]
    if is_loopback(host) and not proxied:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*_LOOPBACK, host]))
    middleware.append(Middleware(WebGuard, door=door, routes=routes, cookie=cookie_name(secure)))
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={EngineError: _engine_failed},
    )


def not_given(camera: str) -> Response | None:
    """Why whoever asks doesn't see a camera, if it isn't among theirs; whether there is one, they aren't told."""
    if WHO.get().sees(camera):
        return None
    return text(403, f"{camera[:80]!r} isn't among the cameras that {WHO.get().name} is given")


def give(audit: Audit, way: str, request: Request, picture: Picture) -> None:
    """A picture is about to leave."""
    audit.gave(way, WHO.get(), caller_of(request), picture.camera, picture.rendition, picture.capture_time_ns)


def asked_rendition(request: Request, policy: Policy, there: tuple[str, ...]) -> str | Response:
    """The rendition that a request asks for, or why it doesn't get it.

    Args:
        policy: which renditions this server gives.
        there: that can be made of these measurements, the one for those who don't ask first.
    """
    if not there:
        return text(404, "no reconstructor here for these measurements that this server may use")
    rendition = request.query_params.get("rendition", there[0])
    if rendition not in RENDITIONS:
        return text(400, f"rendition: expected one of {', '.join(RENDITIONS)}")
    given = WHO.get().renditions(policy)
    if rendition not in given:
        return text(403, f"rendition: this server gives {WHO.get().name} only {', '.join(given)} pictures")
    if rendition not in there:
        return text(404, f"rendition: no {rendition} reconstructor for this camera here")
    return rendition


def text(status: int, line: str) -> Response:
    """A line of text, never stored."""
    return PlainTextResponse(line + "\n", status, headers=NEVER_STORED)


async def _engine_failed(request: Request, error: Exception) -> Response:
    return text(503, "the reconstructor failed, see the server's log")


async def _newer(
    request: Request,
    cameras: Cameras,
    policy: Policy,
    rendition: str,
    seen: dict[str, int],
    names: list[str],
    audit: Audit,
) -> Response:
    """The newest picture of every camera, or of those named, unless it is ``seen`` by its serial number; else 204.

    Of each it is the rendition that is asked for, if there is one of it, or else the one for those who don't ask.

    What the page asks for, again and again, with one request for all cameras, since a browser opens few connections
    to a server: a slow browser asks less often and never gets a backlog, and a hidden one doesn't ask. While it asks it
    counts as a viewer, and a little longer: what is made between two of its requests is for it.

    The body holds for each picture: u32 length of its JSON, u32 length of its JPEG, JSON (name, serial, time captured
    in ms since 1970, id of its reconstructor), JPEG.
    """
    deadline = time.monotonic() + _LONGEST_WAIT_S
    with ExitStack() as watching:
        watched: set[Relay] = set()
        while True:
            changed = cameras.changed()
            asked = {
                camera.name: camera.relays[given]
                for camera in cameras.all()
                if (given := rendition if rendition in camera.renditions else camera.rendition)
                in WHO.get().renditions(policy)
                and WHO.get().sees(camera.name)
                and (not names or camera.name in names)
            }
            for relay in set(asked.values()) - watched:
                watched.add(relay)
                watching.enter_context(relay.watch())
            fresh = [
                (name, relay.serial, relay.latest)
                for name, relay in asked.items()
                if relay.latest is not None and relay.serial != seen.get(name)
            ]
            if fresh:
                break
            await _before_long(changed.wait(), min(_LOOK_EVERY_S, deadline - time.monotonic()))
            if cameras.closed or await request.is_disconnected():
                return Response(status_code=204, headers=NEVER_STORED)
            if time.monotonic() >= deadline:
                break
        for relay in watched:
            relay.linger()
    if not fresh:
        return Response(status_code=204, headers=NEVER_STORED)
    if not WHO.get().holds():
        return text(401, "sign in again")
    parts: list[bytes] = []
    for name, serial, picture in fresh:
        give(audit, "page", request, picture)
        time_ms = round(picture.capture_time_ns / 1e6, 3)
        head = {"name": name, "serial": serial, "time_ms": time_ms, "reconstructor": picture.reconstructor_id}
        told, data = json.dumps(head).encode(), await picture.jpeg()
        parts += [_LENGTHS.pack(len(told), len(data)), told, data]
    return Response(b"".join(parts), media_type="application/octet-stream", headers=NEVER_STORED)


async def _before_long(awaited: Any, seconds: float = _LONGEST_WAIT_S) -> Any:
    """What is awaited, or None when it doesn't come in time or there is no more of it."""
    try:
        return await asyncio.wait_for(awaited, max(0.0, seconds))
    except (TimeoutError, StopAsyncIteration):
        return None


async def _parts(relay: Relay, request: Request, audit: Audit) -> AsyncIterator[bytes]:
    # A browser shows a part once the boundary after it has come: each part ends with it, and doesn't wait for the next.
    boundary = f"--{_BOUNDARY}\r\n".encode()
    yield boundary
    with relay.watch() as pictures:
        async for picture in pictures:
            if not WHO.get().holds():
                return
            give(audit, "MJPEG", request, picture)
            data = await picture.jpeg()
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            yield head + data + b"\r\n" + boundary


def _told(camera: Camera, known: set[str], given: tuple[str, ...]) -> dict[str, Any]:
    camera.look()
    latest, offset_ns = camera.latest, camera.clock_offset_ns
    fps, kbit_s = camera.lately()
    return {
        "name": camera.name,
        "state": camera.state,
        "since_ms": round(camera.since_ns / 1e6),
        "silent_s": round(time.monotonic() - camera.last_seen, 1),
        "fps": round(fps, 1),
        "kbit_s": round(kbit_s),
        "latency_ms": round((latest.shown_time_ns - latest.capture_time_ns) / 1e6, 1) if latest else None,
        "clock_offset_ms": round(offset_ns / 1e6, 1) if offset_ns is not None else None,
        "sequence": latest.sequence if latest else 0,
        "size": [latest.pixels.shape[1], latest.pixels.shape[0]] if latest else None,
        "renditions": [each for each in camera.renditions if each in given],
        "reconstructor": latest.reconstructor_id if latest and latest.reconstructor_id in known else None,
    }


def _measured(each: Reconstructor) -> dict[str, Any]:
    """What is known of a reconstructor, for the page and for programs."""
    return {
        "id": each.id,
        "name": each.name,
        "rendition": each.rendition,
        "operator_id": each.operator_id,
        "rows": each.engine.rows,
        "engine": each.engine.name,
        "device": each.engine.device,
        "precision": each.engine.precision,
        "measured": each.measured,
        "measured_form": each.measured_form,
    }
