"""Where the table is asked: for every request of the page, and for every call of gRPC, before anything else sees it."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from grpc import aio
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decoder.access.addresses import address_of, network_of
from decoder.access.door import Door
from decoder.access.roles import EVERYONE, NOBODY, WHO, Who
from decoder.access.tls import names_shown
from decoder.seldom import Seldom

log = logging.getLogger("veilcam.decode")

_BEARER = "bearer "


class WebGuard:
    """Lets those through to the page whom the table has.

    Args:
        app: what is guarded.
        door: who someone is; without one, everyone is let in.
        routes: all there are; a request's endpoint is the path of the one that it matches.
        cookie: name of the session's.
    """

    def __init__(self, app: ASGIApp, door: Door | None, routes: Sequence[BaseRoute], cookie: str) -> None:
        self._app, self._door, self._routes, self._cookie = app, door, routes, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there is no other way in
        who, endpoint = EVERYONE, None
        if self._door is not None:
            who, endpoint = self._who(self._door, Request(scope)), self._endpoint(scope)
        if who.may(endpoint) or (endpoint is None and who is not NOBODY):  # what isn't there, the app says
            WHO.set(who)
            await self._app(scope, receive, send)
            return
        await self._refused(who, endpoint)(scope, receive, send)

    def _who(self, door: Door, request: Request) -> Who:
        told = request.headers.get("authorization")
        if told is not None:
            return _by_token(door, told)
        cookie = request.cookies.get(self._cookie)
        return door.by_session(cookie) if cookie else NOBODY

    def _endpoint(self, scope: Scope) -> str | None:
        for route in self._routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return route.path
        return None

    def _refused(self, who: Who, endpoint: str | None) -> Response:
        headers = {"Cache-Control": "no-store"}
        if who is not NOBODY:
            return Response(f"{who.name} ({who.role}) may not ask for this\n", 403, headers, "text/plain")
        if endpoint == "/":
            return RedirectResponse("/login", 303, headers)
        headers["WWW-Authenticate"] = "Bearer"
        told = "sign in at /login, or send a token (Authorization: Bearer TOKEN)\n"
        return Response(told, 401, headers, "text/plain")


class SafeHeaders:
    """Says with every answer what a browser must not do with it, unless the answer says so itself.

    Args:
        app: what answers.
        strict: seconds for which a browser is to come back over TLS alone; 0 says nothing of it.
    """

    def __init__(self, app: ASGIApp, strict: int) -> None:
        self._app = app
        said = {"Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff"}
        said |= {"Content-Security-Policy": "frame-ancestors 'none'"}
        said |= {"Strict-Transport-Security": f"max-age={strict}"} if strict else {}
        self._said = [(name.lower().encode(), value.encode()) for name, value in said.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def saying(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(each for each in self._said if each[0] not in known)]
            await send(message)

        await self._app(scope, receive, saying)


class GrpcGuard(aio.ServerInterceptor):
    """Lets those through to a service whom the table has, each with so many calls at one time.

    Args:
        door: who someone is; without one, everyone is let in.
        most: calls open at one time by one peer: a certificate's name, or an address that shows none.
        message_s: in which the message must come of a call that has one. gRPC would wait for it without an end, and
            before it counts: so here such a call is to gRPC one of many messages, of which the first is read.
    """

    def __init__(self, door: Door | None, most: int, message_s: float) -> None:
        self._door, self._most, self._message_s = door, most, message_s
        self._open: Counter[str] = Counter()
        self._tell = Seldom()

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers that there is no such method
        endpoint = handler_call_details.method
        inner = {
            (False, False): handler.unary_unary,
            (False, True): handler.unary_stream,
            (True, False): handler.stream_unary,
            (True, True): handler.stream_stream,
        }[handler.request_streaming, handler.response_streaming]

        async def asked(requests: AsyncIterator[Any], context: "aio.ServicerContext[Any, Any]") -> Any:
            return requests if handler.request_streaming else await self._message(requests, context)

        async def one(requests: AsyncIterator[Any], context: "aio.ServicerContext[Any, Any]") -> Any:
            async with self._inside(endpoint, context):
                return await inner(await asked(requests, context), context)

        async def many(requests: AsyncIterator[Any], context: "aio.ServicerContext[Any, Any]") -> None:
            async with self._inside(endpoint, context):
                answers = inner(await asked(requests, context), context)
                if not isinstance(answers, AsyncIterable):
                    await answers
                    return
                async with aclosing(answers) as each:  # type: ignore[type-var]
                    async for answer in each:
                        await context.write(answer)

        formats = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(many, *formats)
        return grpc.stream_unary_rpc_method_handler(one, *formats)

    async def _message(self, requests: AsyncIterator[Any], context: "aio.ServicerContext[Any, Any]") -> Any:
        """The message of a call that has one; a call that has none is refused."""
        try:
            async with asyncio.timeout(self._message_s):
                return await anext(requests)
        except TimeoutError:
            problem = f"message: none within {self._message_s:.0f} s"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, problem)
        except StopAsyncIteration:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "message: none, this call has one")

    @asynccontextmanager
    async def _inside(self, endpoint: str, context: "aio.ServicerContext[Any, Any]") -> AsyncIterator[None]:
        names = names_shown(context)
        peer = names[0] if names else network_of(address_of(context.peer()))
        if self._open[peer] >= self._most:
            problem = f"peer: {self._open[peer]} calls of {peer!r} are open, this server allows {self._most}"
            if self._tell.now():
                log.warning("%s at %s: %s (max_peer_streams)", endpoint, context.peer(), problem)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
        self._open[peer] += 1
        try:
            if self._door is None:
                WHO.set(EVERYONE)
            else:
                await self._let_in(self._door, endpoint, context)
            yield
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]

    async def _let_in(self, door: Door, endpoint: str, context: "aio.ServicerContext[Any, Any]") -> None:
        who = self._who(door, context)
        if who.may(endpoint):
            WHO.set(who)
            return
        if who is NOBODY:
            problem = "authorization: send a token (Bearer), or a certificate that names a camera or a program here"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, problem)
        problem = f"authorization: {who.name} ({who.role}) may not call {endpoint}"
        log.warning("%s at %s: %s", who.name, context.peer(), problem)
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)

    def _who(self, door: Door, context: "aio.ServicerContext[Any, Any]") -> Who:
        for key, told in context.invocation_metadata() or ():
            if key == "authorization":
                return _by_token(door, told) if isinstance(told, str) else NOBODY
        return door.by_certificate(names_shown(context))


def _by_token(door: Door, told: str) -> Who:
    """Whose token an authorization holds."""
    return door.by_token(told[len(_BEARER) :]) if told.lower().startswith(_BEARER) else NOBODY
