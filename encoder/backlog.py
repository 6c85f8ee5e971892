"""What is late, sent beside the live stream: at a limited rate, and only while the live stream has room."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import grpc

from encoder.backoff import REFUSED_WAIT_S, Backoff
from encoder.sinks import UNANSWERED_S, SinkError, open_channel
from encoder.spool import Part, Spool
from encoder.tls import Tls
from protos.segment import Segment, SegmentError, key_of, with_base
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub

log = logging.getLogger("veilcam.encode")

_POLL_S = 0.1
_LASTING = {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
"""Refusals that every part meets, until people remove the reason."""
_PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.FAILED_PRECONDITION}
"""Of which the live stream tells, or nobody needs to hear: it is tried again in a moment."""


class Backlog:
    """Sends a spool's late parts, one after the other, from a thread of its own, and tends the spool.

    Args:
        address: ``HOST:PORT`` of the decoder service.
        tls: as for the live stream.
        spool: whose parts.
        rate: frames a second at most.
        flows: whether the live stream has room now.
    """

    def __init__(self, address: str, tls: Tls | None, spool: Spool, rate: float, flows: Callable[[], bool]) -> None:
        self._address, self._tls, self._spool, self._rate, self._flows = address, tls, spool, rate, flows
        self._stop = threading.Event()
        self._channel: grpc.Channel | None = None
        self._backoff = Backoff()
        self._told: set[grpc.StatusCode] = set()
        self._due = self._not_before = self._moved = 0.0
        self._since = spool.late
        self._thread = threading.Thread(target=self._run, name="backlog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send no more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._spool.tend()
            while not self._stop.is_set() and self._flows() and time.monotonic() >= self._not_before:
                part = self._spool.take()
                if part is None:
                    self._rest()
                    break
                self._send(part)
        self._hang_up()

    def _rest(self) -> None:
        self._hang_up()
        if self._spool.late > self._since:
            log.info("%s: the backlog is through: %d frames sent late", self._address, self._spool.late - self._since)
            self._since = self._spool.late

    def _send(self, part: Part) -> None:
        pending = list(part.pending)
        if not pending:
            self._spool.done(part, (), 0)
            return
        try:
            segment = Segment(part.path)
            offset = key_of(segment.entries(), pending[0])
            frames = [frame for frame in with_base(segment.frames(offset)) if frame.sequence <= pending[-1]]
        except (SegmentError, OSError) as error:
            log.warning("spool: %s can't be read: %s", part.path.name, error)
            frames = []
        read = {frame.sequence for frame in frames}
        if not read & set(pending):
            self._spool.done(part, read, 0)
            return
        over = threading.Event()
        self._moved = time.monotonic()
        try:
            self._channel = self._channel or open_channel(self._address, self._tls)
            call = CamerasStub(self._channel).Backlog.future(self._requests(segment.hello, frames, over))
            while not call.done() and time.monotonic() - self._moved < UNANSWERED_S:
                if self._stop.wait(_POLL_S / 10):
                    break
            if not call.done():
                call.cancel()
            response = call.result()
        except SinkError as error:
            self._refused(part, grpc.StatusCode.UNAUTHENTICATED, str(error))
        except grpc.FutureCancelledError:
            self._refused(part, grpc.StatusCode.CANCELLED, "")
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            self._refused(part, error.code(), f"{self._address}: {error.details()}")
        else:
            self._backoff.reset()
            self._told.clear()
            self._spool.done(part, read, response.recorded)
        finally:
            over.set()

    def _requests(
        self, hello: pb.Hello, frames: Sequence[pb.Frame], over: threading.Event
    ) -> Iterator[pb.PublishRequest]:
        yield pb.PublishRequest(hello=hello)
        for frame in frames:
            while time.monotonic() < self._due or not self._flows():
                self._moved = time.monotonic()
                if over.wait(min(_POLL_S, max(0.001, self._due - time.monotonic()))):
                    return
            self._moved = time.monotonic()
            self._due = max(self._due + 1 / self._rate, self._moved)
            yield pb.PublishRequest(frame=frame)

    def _refused(self, part: Part, status: grpc.StatusCode, problem: str) -> None:
        if status not in _PASSING | self._told:
            self._told.add(status)
            log.warning("backlog: %s (%s); it waits in %s", problem, status.name, self._spool.folder)
        self._hang_up()
        of_the_part = status not in _PASSING | _LASTING  # others may not meet it
        self._spool.put_back(part, REFUSED_WAIT_S if of_the_part else 0.0)
        self._not_before = time.monotonic() + (REFUSED_WAIT_S if status in _LASTING else self._backoff.wait())

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
