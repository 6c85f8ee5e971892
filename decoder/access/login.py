"""Signing in and out on the page."""

import html
from urllib.parse import parse_qs, urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from decoder.access.addresses import caller_of
from decoder.access.door import SESSION_S, Door, TooManyTriesError

_LONGEST_FORM = 4096
_MOST_FIELDS = 10
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'",
}
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>VeilCam: sign in</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 15px/1.45 system-ui, sans-serif; margin: 15vh auto 0; max-width: 20rem; padding: 0 1rem; }}
  label, input, button {{ display: block; width: 100%; box-sizing: border-box; font: inherit; }}
  input, button {{ padding: .4rem .6rem; margin: .2rem 0 .9rem; }}
</style>
<h1>VeilCam</h1>
<p role="alert">{problem}</p>
<form method="post" action="/login">
  <label for="name">Name</label><input id="name" name="name" autocomplete="username" required autofocus>
  <label for="password">Password</label>
  <input id="password" name="password" type="password" autocomplete="current-password" required>
  <button>Sign in</button>
</form>
</html>
"""


def cookie_name(secure: bool) -> str:
    """A browser takes a name that begins with ``__Host-`` from this host over TLS alone."""
    return "__Host-veilcam" if secure else "veilcam"


def login(door: Door, secure: bool) -> list[Route]:
    """Routes.

    Args:
        secure: TLS is spoken, and the cookie goes over nothing else.
    """
    name = cookie_name(secure)

    async def form(request: Request) -> Response:
        return _form(200, "")

    async def sign_in(request: Request) -> Response:
        if _foreign(request):
            return _form(403, "That came from another page.")
        body = b""
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > _LONGEST_FORM:
                    return _form(413, "That is too long.")
        except ClientDisconnect:
            return _form(400, "Half of that is missing.")  # told to nobody
        try:
            told = parse_qs(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
        except ValueError:
            return _form(400, "That isn't this form.")
        who, password = (told.get(field, [""])[0] for field in ("name", "password"))
        try:
            cookie = await door.sign_in(who, password, caller_of(request))
        except TooManyTriesError as error:
            answer = _form(429, f"Too many wrong passwords. Try again in {error.seconds / 60:.0f} minutes.")
            answer.headers["Retry-After"] = str(int(error.seconds) + 1)
            return answer
        if cookie is None:
            return _form(401, "Wrong name or password.")
        answer = RedirectResponse("/", 303, _HEADERS)
        safe = secure or request.url.scheme == "https"  # to a trusted proxy, as it says
        answer.set_cookie(name, cookie, int(SESSION_S), path="/", secure=safe, httponly=True, samesite="strict")
        return answer

    async def sign_out(request: Request) -> Response:
        if _foreign(request):
            return PlainTextResponse("from another page\n", 403, _HEADERS)
        door.sign_out(request.cookies.get(name, ""))
        answer = RedirectResponse("/login", 303, _HEADERS)
        answer.delete_cookie(name, path="/", secure=secure, httponly=True, samesite="strict")
        return answer

    return [
        Route("/login", form, methods=["GET"]),
        Route("/login", sign_in, methods=["POST"]),
        Route("/logout", sign_out, methods=["POST"]),
    ]


def _form(status: int, problem: str) -> Response:
    return HTMLResponse(_PAGE.format(problem=html.escape(problem)), status, _HEADERS)


def _foreign(request: Request) -> bool:
    """Whether a browser says that another site's page sends this."""
    origin = request.headers.get("origin")
    try:
        return origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    except ValueError:  # as of "http://[x": no browser says that of a page of ours
        return True
