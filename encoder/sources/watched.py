"""A live source that is watched: when it gives no frame for some seconds, or ends, it is opened again, for ever.

It is read in a process of its own (``reader.py``), which can be ended whatever it hangs in.
"""

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from encoder.backoff import Backoff, Outage
from encoder.sources import Frame, SourceAwayError, SourceError, masked
from encoder.sources.reader import AWAY, FRAME, HEAD, OPENED

log = logging.getLogger("veilcam.encode")

SILENCE_S = 10.0
OPENING_S = 15.0
"""What opening may take at least, whatever silence is allowed: a process starts, a network camera is asked."""
HELD_S = 10.0
"""A source that gave frames for so long is a sound one: after it, tries begin quickly again."""

_POLL_S = 0.25
_PIPE_BYTES = 1 << 20
_END_S = 2.0
_ROOT = str(Path(__file__).parents[2])
"""Where the reader finds the very code that runs here, whatever folder a user is in."""


class WatchedSource:
    """A live source that doesn't end before it is told to.

    Args:
        spec: as for ``open_source``.
        silence_s: seconds without a frame after which it is opened again.
        stop: ends it, from any thread.
        opening_s: what opening may take, if that is more.

    Raises:
        SourceError: at the start, it can't be opened for a reason that won't pass by itself. Later, each reason is
            told and tried again.
    """

    live = True

    def __init__(
        self,
        spec: str,
        silence_s: float = SILENCE_S,
        stop: threading.Event | None = None,
        opening_s: float = OPENING_S,
    ) -> None:
        self.name, self.frame_rate = masked(spec), 0.0
        self.outages, self._seconds_away = 0, 0.0
        self._spec = spec
        self._silence_s, self._opening_s = silence_s, max(silence_s, opening_s)
        self._stop = stop or threading.Event()
        self._over = threading.Event()
        self._backoff = Backoff()
        self._outage: Outage | None = None
        self._reader: _Reader | None = None
        while self._reader is None and not self._ended():
            try:
                self._reader = self._opened()
            except SourceAwayError as error:
                self._wait_after(error)

    @property
    def away_since(self) -> str:
        """When the outage began that isn't over; empty if there is none."""
        outage = self._outage
        return outage.since if outage else ""

    @property
    def seconds_away(self) -> float:
        """Of all outages together."""
        outage = self._outage
        return self._seconds_away + (outage.seconds if outage else 0.0)

    def frames(self) -> Iterator[Frame]:
        while not self._ended():
            try:
                self._reader = self._reader or self._opened()
                yield from self._read(self._reader)
            except SourceError as error:
                self._wait_after(error)

    def close(self) -> None:
        """End it, also while frames are waited for in another thread."""
        self._over.set()
        if self._reader is not None:
            self._reader.end()

    def _ended(self) -> bool:
        return self._stop.is_set() or self._over.is_set()

    def _opened(self) -> "_Reader":
        reader = _Reader(self._spec, self.name, self._ended)
        try:
            told = reader.receive(self._opening_s, "doesn't open within")
            if isinstance(told, tuple):
                self.name, self.frame_rate = told
        except BaseException:
            reader.end()
            raise
        return reader

    def _read(self, reader: "_Reader") -> Iterator[Frame]:
        began = time.monotonic()
        while isinstance(frame := reader.receive(self._silence_s, "no frame for"), Frame):
            if self._outage is not None:
                outage, self._outage = self._outage, None
                self._seconds_away += outage.seconds
                log.info("%s: gives frames again after %.1f s (since %s)", self.name, outage.seconds, outage.since)
            if time.monotonic() - began > HELD_S:
                self._backoff.reset()
            yield frame

    def _wait_after(self, error: SourceError) -> None:
        """It gives nothing any more: say why, free what it holds, and wait for a while."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.end()
        if self._ended():
            return
        if self._outage is None:
            self.outages += 1
            self._outage = Outage()
        if self._outage.is_news(str(error)):
            log.warning("%s; opening it again until it gives frames", error)
        until = time.monotonic() + self._backoff.wait()
        while not self._ended() and (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, _POLL_S))


class _Reader:
    """A process that reads a source.

    Args:
        ended: asked while it is waited for; if so, there is nothing to wait for any more.

    Raises:
        SourceAwayError: this machine has nothing left to start it with.
    """

    def __init__(self, spec: str, name: str, ended: Callable[[], bool]) -> None:
        self._name, self._ended = name, ended
        self._lock = threading.Lock()
        self._closed = False
        # A session of its own: Ctrl-C is for the encoder, which ends its readers.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "encoder.sources.reader"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:  # no memory, no descriptors: of that there may be again
            raise SourceAwayError(f"{name}: no process to read it can be started ({error.strerror})") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        with contextlib.suppress(OSError):  # a user may have only so much of it
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        with contextlib.suppress(BrokenPipeError):
            self._in.write(json.dumps(spec).encode() + b"\n")

    def receive(self, within_s: float, late: str) -> Frame | tuple[str, float] | None:
        """A frame, or name and rate when the source was opened; None if ``ended``.

        Raises:
            SourceError: why there is none; ``SourceAwayError`` if that may pass.
        """
        deadline = time.monotonic() + within_s
        too_late = SourceAwayError(f"{self._name}: {late} {within_s:g} s")
        head = bytearray(HEAD.size)
        if not self._fill(memoryview(head), deadline, too_late):
            return None
        what, height, width, captured_ns, milliseconds, colour = HEAD.unpack(head)
        if what == FRAME:
            luma = np.empty((height, width), np.uint8)
            whole = self._fill(luma.data.cast("B"), deadline, too_late)
            return Frame(luma, captured_ns, milliseconds, bool(colour)) if whole else None
        text = bytearray(height)
        if not self._fill(memoryview(text), deadline, too_late):
            return None
        if what == OPENED:
            name, rate = json.loads(text)
            return str(name), float(rate)
        raise (SourceAwayError if what == AWAY else SourceError)(text.decode())

    def end(self) -> None:
        """End the process, whatever it is in, and free what it holds; from any thread."""
        self._process.kill()
        with self._lock:
            self._closed = True
            self._out.close()
            with contextlib.suppress(OSError):
                self._in.close()
        # One that a driver doesn't let go stays until the driver does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)

    def _how_it_ended(self) -> str:
        """How the process ended, whose output has ended."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "it still hangs"
        if code >= 0:
            return f"exit code {code}"
        names = {each.value: each.name for each in signal.Signals}
        return names.get(-code, f"signal {-code}")

    def _fill(self, into: memoryview, deadline: float, too_late: SourceAwayError) -> bool:
        """Fill a buffer; False if ``ended`` before that."""
        while into:
            if self._ended():
                return False
            with self._lock:
                if self._closed:
                    return False
                if self._poll.poll(_POLL_S * 1000):
                    count = self._out.readinto(into)  # type: ignore[attr-defined]
                    if not count:
                        raise SourceAwayError(
                            f"{self._name}: the process that reads it broke down ({self._how_it_ended()})"
                        )
                    into = into[count:]
            if into and time.monotonic() > deadline:
                raise too_late
        return True
