"""What is told of each change of a camera's state: a program, or a server by URL.

A URL is sent a POST with a JSON body:
``{"camera": "porch", "state": "silent", "since": "2026-01-31T12:00:00.000+00:00"}``.
A command gets the same three as its last arguments. Either has some seconds; the next waits meanwhile, in a queue that
loses the oldest when it is full. Cameras and viewers never wait.
"""

import base64
import contextlib
import http.client
import json
import logging
import os
import queue
import re
import shlex
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from datetime import UTC, datetime
from urllib.parse import unquote, urlsplit, urlunsplit

from decoder.cameras import Camera

log = logging.getLogger("veilcam.decode")

TIMEOUT_S = 10.0
WAITING = 256
"""Changes that wait for their turn, at most."""
_KILLED_S = 2.0
"""A command that was killed is waited for so long."""
_LEFT = 8
"""Commands that can't be ended, as of another user: so many may be left running, and no more is run beside them."""
ON_CLOSE_S = 2.0

Change = tuple[str, str, str]
"""Camera, state, since when."""


class Hook:
    """Calls what ``on_change`` names, in a thread of its own.

    Args:
        target: an http(s) URL, a name and password in it allowed, or a command as a shell would split it.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._url = re.match("https?://", target, re.IGNORECASE) is not None
        self._queue: queue.Queue[Change | None] = queue.Queue(WAITING)
        self._failing = False
        self._calling = False
        self._left: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._call_all, name="hook", daemon=True)
        self._thread.start()

    def tell(self, camera: Camera) -> None:
        """A camera's state has changed."""
        since = datetime.fromtimestamp(camera.since_ns / 1e9, UTC).isoformat(timespec="milliseconds")
        while True:
            try:
                self._queue.put_nowait((camera.name, camera.state, since))
                return
            except queue.Full:
                self._drop()

    def close(self, seconds: float = ON_CLOSE_S) -> None:
        """Call for what waits already, within a limit; what isn't told by then is a line in the log."""
        if self._queue.full():
            self._drop()
        self._queue.put(None)
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return
        untold, calling = list[Change](), self._calling
        with contextlib.suppress(queue.Empty):
            while True:
                if (change := self._queue.get_nowait()) is not None:
                    untold.append(change)
        self._queue.put(None)
        last = "; ".join(" is ".join(state) for state in {change[0]: change[1] for change in untold}.items())
        log.error(
            "on_change %s: the service ends before %d changes were told%s%s",
            *(self._shown(), len(untold), f" ({last})" if last else "", ", and one is being told" if calling else ""),
        )

    def _drop(self) -> None:
        try:
            dropped = self._queue.get_nowait()
        except queue.Empty:
            return
        if dropped is not None:
            log.warning("on_change: too slow; camera %s is %s since %s isn't told", *dropped)

    def _call_all(self) -> None:
        while (change := self._queue.get()) is not None:
            self._calling = True
            problem = self._post(change) if self._url else self._run(change)
            self._calling = False
            if problem:
                log.error("on_change %s: %s; camera %s is %s since %s wasn't told", self._shown(), problem, *change)
            elif self._failing:
                log.info("on_change %s: works again", self._shown())
            self._failing = bool(problem)

    def _post(self, change: Change) -> str:
        parts = urlsplit(self._target)
        headers = {"Content-Type": "application/json", "User-Agent": "veilcam-decode"}
        if parts.username is not None:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
        body = json.dumps(dict(zip(("camera", "state", "since"), change, strict=True))).encode()
        try:
            request = urllib.request.Request(url, body, headers, method="POST")  # noqa: S310 - http(s), settings check it
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_S):
                return ""
        except urllib.error.HTTPError as error:
            with error:
                return f"answered {error.code}"
        except urllib.error.URLError as error:
            return f"can't be reached ({error.reason})"
        except (OSError, http.client.HTTPException, ValueError) as error:
            return f"can't be told ({type(error).__name__})"

    def _run(self, change: Change) -> str:
        self._left = [process for process in self._left if process.poll() is None]
        if len(self._left) >= _LEFT:
            return f"{_LEFT} that can't be ended are still running, and it isn't run beside them"
        try:
            process = subprocess.Popen(  # noqa: S603 - the administrator's own command, without a shell
                [*shlex.split(self._target), *change], stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            return f"can't be run ({error.strerror})"
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"not through within {TIMEOUT_S:.0f} s, and {self._ended(process)}"
        return f"ended with {code}" if code else ""

    def _ended(self, process: "subprocess.Popen[bytes]") -> str:
        """End a command with all that it has begun, and wait for it, but not for ever: it may not be ours to end."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_KILLED_S)
        except OSError as error:
            problem = error.strerror
        except subprocess.TimeoutExpired:
            problem = f"killed, and still there after {_KILLED_S:.0f} s"
        else:
            return "ended"
        self._left.append(process)
        return f"it can't be ended ({problem}): it is left running"

    def _shown(self) -> str:
        """As much of it as holds no secret: of a URL where it leads, of a command its first word."""
        if not self._url:
            return shlex.split(self._target)[0]
        parts = urlsplit(self._target)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/…"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What was named is told, and no other: a secret in the request goes nowhere else."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None
