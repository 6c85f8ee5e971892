"""The way to a decoder service that is there again whenever the service is: tries for ever, and says so once.

                ┌──────────── frames flow ◀──────────────┐ taken by the pipeline
wait, try ──▶ connected ──▶ first acknowledged: "back"   │
  ▲   └ refused for good, and never taken before: ends   │
  └──────────────── broken: one line ◀───────────────────┘
"""

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

import grpc

from encoder.backoff import REFUSED_WAIT_S, Backoff, Outage
from encoder.sinks import Progress, ServerSink, SinkError
from encoder.tls import Tls
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.encode")

HELD_S = 10.0
"""A connection that held for so long was a sound one: after it, tries begin quickly again, and an outage is over even
if there was nothing to send."""
NAME_TAKEN_S = 10.0
"""At the start, a name that is publishing may be this camera's own stream of before, which the server will let go."""

_BY_PEOPLE = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
}
"""Refusals that don't pass by themselves."""


class ServerLink:
    """Streams to a decoder service, one after the other; a sink that outlives the service's absence.

    A refusal of the very first hello that can't pass by itself is raised, since whoever started the camera is there to
    read it. Once the server has taken the camera, every refusal is told and tried again, the ones that people must
    remove once a minute.

    Args:
        address: ``HOST:PORT``; looked up anew at each try.
        hello: sent first on each stream.
        dropped: counts frames by reason; ``server away`` is read here, ``lost on the way`` is counted here.
        lossless: as ``ServerSink`` has it; what was lost with a connection is told by ``take_lost``.
        resizable: whether a picture of another size begins another stream.
        give_up_s: raise after so many seconds of absence; 0 for never.
        tls: as ``ServerSink`` has it; its files are read anew at each try.
    """

    def __init__(
        self,
        address: str,
        hello: pb.Hello,
        dropped: Counter[str],
        lossless: bool = False,
        resizable: bool = False,
        give_up_s: float = 0.0,
        tls: Tls | None = None,
    ) -> None:
        self.name = address
        self._hello, self._dropped, self._tls = hello, dropped, tls
        self._lossless, self._resizable, self._give_up_s = lossless, resizable, give_up_s
        self._news = threading.Condition()
        self._sink: ServerSink | None = None
        self._connected: ServerSink | None = None
        self._problem: SinkError | None = None
        self._latest = SinkError(f"{address}: no decoder service answers")
        self._before = Progress()
        self._changes: set[int] = set()
        self._lost = False
        self._taken_once = False
        self._taken_at = 0.0
        self._backoff = Backoff()
        self._outage: Outage | None = None
        self._resizing = False
        self._lost_before: Counter[str] = Counter()
        self.outages, self._seconds_away = 0, 0.0
        self._began = time.monotonic()
        self._stop = self._start(None, 0.0)

    @property
    def away(self) -> bool:
        """Whether frames have nowhere to go now, and the server is to blame."""
        return self._sink is None and not self._resizing

    @property
    def away_since(self) -> str:
        """When the outage began that isn't over; empty if there is none."""
        outage = self._outage
        return outage.since if outage and self._sink is None else ""

    @property
    def seconds_away(self) -> float:
        """Of all outages together."""
        outage, until = self._outage, time.monotonic() if self._sink is None else self._taken_at
        return self._seconds_away + (outage.until(until) if outage else 0.0)

    @property
    def progress(self) -> Progress:
        sink, before = self._sink, self._before
        return before.then(sink.progress) if sink else before

    def wait_until_ready(self, timeout: float) -> bool:
        """Wait for a connection and for room on it; False when there is none yet.

        Raises:
            SinkError: the server refused this camera from the start, or it was away for too long.
        """
        if self._sink is None and not self._take(timeout):
            return False
        assert self._sink is not None
        try:
            ready = self._sink.wait_until_ready(timeout)
        except SinkError as error:
            self._break(error)
            return False
        if self._outage and self._sink.progress.received:
            self._tell_back(self._outage, "frames flow again")
        elif self._outage and time.monotonic() - self._taken_at > HELD_S:
            self._tell_back(self._outage, "there again, though there is nothing to send,")
        return ready

    def take_changes(self) -> set[int]:
        """Changes that the server asked for; on a new stream, a key frame."""
        changes, self._changes = self._changes, set()
        return changes | (self._sink.take_changes() if self._sink else set())

    def take_lost(self) -> bool:
        lost, self._lost = self._lost, False
        return lost

    def send(self, message: pb.PublishRequest) -> bool:
        return self._sink is not None and self._sink.send(message)

    def resize(self, width: int, height: int) -> bool:
        if not self._resizable:
            return False
        log.info("%s: pictures are %d×%d from now on, on a new stream", self.name, width, height)
        with self._news:
            self._stop.set()  # it may be connecting with the size of before
            before, self._sink, self._connected = self._sink or self._connected, None, None
        self._hello.width, self._hello.height = width, height
        self._resizing = self._outage is None
        self._stop = self._start(before, 0.0, whole=True)
        return True

    def close(self) -> None:
        """Wait until the last frame is settled, within a limit.

        Raises:
            SinkError: the server is away, or went before it had acknowledged the last frames.
        """
        with self._news:
            self._stop.set()
            sink, since = self._sink or self._connected, self.away_since
            self._sink = self._connected = None
        if sink is None:
            raise SinkError(f"{self.name}: the server is away" + (f" since {since}" if since else ""))
        try:
            sink.close()
        finally:
            self._part_with(sink)

    def _take(self, timeout: float) -> bool:
        with self._news:
            self._news.wait_for(lambda: self._connected or self._problem, timeout)
            if self._problem:
                raise self._problem
            self._sink, self._connected = self._connected, None
            if self._sink is None and self._is_given_up():
                raise SinkError(f"{self._latest}; given up after {self._give_up_s:g} s", self._latest.status)
        if self._sink is None:
            return False
        self._taken_once, self._resizing = True, False
        self._taken_at = time.monotonic()
        self._changes.add(pb.CHANGE_SEND_KEY)
        return True

    def _break(self, error: SinkError) -> None:
        """The connection is over: say so, and try again in a while."""
        if time.monotonic() - self._taken_at > HELD_S:
            self._backoff.reset()
        with self._news:
            self._tell_away(error)
            sink, self._sink = self._sink, None
        if sink is not None:
            self._part_with(sink)
        self._stop = self._start(sink, self._wait_after(error))

    def _part_with(self, sink: ServerSink) -> None:
        """A connection is over: keep what it told, and count what was on the way on it."""
        self._before = self._before.then(sink.progress)
        self._lost = self._lost or (self._lossless and sink.unacknowledged > 0)
        self._lose(sink)

    def _lose(self, sink: ServerSink) -> None:
        """A connection is over: count what was on the way on it."""
        if not self._lossless:
            self._dropped["lost on the way"] += sink.unacknowledged

    def _kept(self, kept: Sequence[pb.Sequences]) -> None:
        """The server has told what it keeps; from the connection's own thread."""

    def _also(self) -> str:
        """What else is to be said when frames flow again."""
        return ""

    def _start(self, before: ServerSink | None, wait_s: float, whole: bool = False) -> threading.Event:
        """Try in a thread of its own; what is returned ends that, and nothing waits for it."""
        stop, hello = threading.Event(), pb.Hello()
        hello.CopyFrom(self._hello)
        arguments = (stop, hello, before, wait_s, whole)
        threading.Thread(target=self._connect, args=arguments, name="connect", daemon=True).start()
        return stop

    def _connect(
        self, stop: threading.Event, hello: pb.Hello, before: ServerSink | None, wait_s: float, whole: bool
    ) -> None:
        """Try until there is a connection.

        Args:
            stop: to try no more.
            hello: sent first.
            before: the connection of before, to be ended first.
            wait_s: before the first try.
            whole: what is on the way on the connection of before is to arrive.
        """
        if before is not None and whole:
            with contextlib.suppress(SinkError):
                before.close()
            with self._news:
                self._part_with(before)
        elif before is not None:
            before.drop()
        while not stop.wait(wait_s):
            try:
                sink = ServerSink(self.name, hello, self._lossless, stop, self._tls, self._kept)
            except Exception as error:  # noqa: BLE001 - nothing else listens to this thread, and it is to try for ever
                problem = error if isinstance(error, SinkError) else SinkError(f"{self.name}: {error!r}")
                with self._news:
                    if stop.is_set():
                        return
                    if self._is_final(problem):
                        self._problem = problem
                        self._news.notify_all()
                        return
                    self._tell_away(problem)
                wait_s = self._wait_after(problem)
            else:
                with self._news:
                    if not stop.is_set():
                        self._connected = sink
                        self._news.notify_all()
                        return
                sink.drop()
                return

    def _is_final(self, error: SinkError) -> bool:
        if self._taken_once or error.status not in _BY_PEOPLE:
            return False
        return error.status is not grpc.StatusCode.ALREADY_EXISTS or time.monotonic() - self._began > NAME_TAKEN_S

    def _is_given_up(self) -> bool:
        away_s = self._outage.seconds if self._outage else 0.0 if self._taken_once else time.monotonic() - self._began
        return 0 < self._give_up_s <= away_s

    def _wait_after(self, error: SinkError) -> float:
        wait_s = self._backoff.wait()
        lasts = error.status in _BY_PEOPLE and error.status is not grpc.StatusCode.ALREADY_EXISTS
        return wait_s / 30 + REFUSED_WAIT_S if lasts else wait_s

    def _tell_away(self, error: SinkError) -> None:
        """One line when an outage begins, and one more for each other reason that it then has."""
        self._resizing, self._latest = False, error
        if self._outage is None:
            self.outages += 1
            self._outage, self._lost_before = Outage(), Counter(self._dropped)
        unreachable = error.status is None or error.status is grpc.StatusCode.UNAVAILABLE
        reason = str(error) if error.known else "away" if unreachable else str(error.status)
        if self._outage.is_news(reason):
            log.warning("%s; trying again until it takes this camera", error)

    def _tell_back(self, outage: Outage, how: str) -> None:
        """It was over when there was a connection, whatever there was to send."""
        self._outage = None
        seconds = outage.until(self._taken_at)
        self._seconds_away += seconds
        lost = self._dropped - self._lost_before
        log.info(
            "%s: %s after %.1f s (since %s); frames not sent meanwhile: %d, lost on the way: %d%s",
            *(self.name, how, seconds, outage.since, lost["server away"], lost["lost on the way"], self._also()),
        )
