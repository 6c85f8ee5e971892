"""What is late, sent beside the live stream: at a limited rate, and only while the live stream has room."""

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import grpc

from encoder.backoff import REFUSED_WAIT_S, Backoff
from encoder.sinks import SinkError, open_channel, patience_s
from encoder.spool.part import Part
from encoder.spool.spool import Spool
from encoder.tls import Tls
from protos.segment import Segment, SegmentError, SegmentUnreadableError, key_of, with_base
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub

log = logging.getLogger("veilcam.encode")

_POLL_S = 0.1
_FIRST_FRAMES = 64
"""So many are in a call until it is known how soon the server answers."""
_LONGEST_PATIENCE_S = 600.0
_LASTING = {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
"""Refusals that every part meets, until people remove the reason."""
_PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.FAILED_PRECONDITION}
"""Of which the live stream tells, or nobody needs to hear: it is tried again in a moment."""


class Backlog:
    """Sends a spool's late parts, one after the other, from a thread of its own, and tends the spool.

    A server says what it has taken at the end of a call. One that takes fewer frames than are sent is silent until
    then, as one that hangs is: so a call has no more frames than it answered in time before, down to one, and then
    waits for longer.

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
        self._told: set[str] = set()
        self._due = self._not_before = self._moved = 0.0
        self._most, self._needs_s, self._longest_s = _FIRST_FRAMES, 0.0, 0.0
        self._since = spool.late
        self._thread = threading.Thread(target=self._run, name="backlog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send no more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self._round()
            except Exception as error:  # noqa: BLE001 - nothing else listens to this thread, and it is to try for ever
                self._tell(f"{self._address}: {error!r}", type(error).__name__)
                self._not_before = time.monotonic() + REFUSED_WAIT_S
        self._hang_up()

    def _round(self) -> None:
        """Tend the spool, and send what is late until nothing is, or there is no room."""
        self._spool.tend()
        while not self._stop.is_set() and self._flows() and time.monotonic() >= self._not_before:
            part = self._spool.take()
            if part is None:
                self._rest()
                break
            try:
                self._send(part)
            except Exception:
                self._spool.put_back(part, REFUSED_WAIT_S)
                raise
            self._spool.tend()

    def _rest(self) -> None:
        self._hang_up()
        if (sent := self._spool.late - self._since) > 0:
            self._since = self._spool.late
            if waiting := self._spool.put_off:
                log.info("%s: %d frames sent late; %d that it refused wait", self._address, sent, waiting)
            else:
                log.info("%s: the backlog is through: %d frames sent late", self._address, sent)

    def _send(self, part: Part) -> None:
        pending = self._spool.pending_of(part)
        if not pending:
            self._spool.put_back(part)
            return
        last = pending[: self._most][-1]
        try:
            segment = Segment(part.path)
            offset = key_of(segment.entries(), pending[0])
            frames = list(takewhile(lambda frame: frame.sequence <= last, with_base(segment.frames(offset))))
        except (SegmentUnreadableError, OSError) as error:  # which may pass, and isn't damage
            problem = str(error) if isinstance(error, SegmentUnreadableError) else f"{part.path}: {error.strerror}"
            self._tell(f"{problem}; it can't be read for now", "unreadable")
            self._spool.put_back(part, REFUSED_WAIT_S)
            return
        except SegmentError as error:
            log.warning("spool: %s can't be read: %s", part.path.name, error)
            frames, last = [], pending[-1]
        keys = [at for at, frame in enumerate(frames) if not frame.base_sequence and frame.sequence > pending[0]]
        if last < pending[-1] and keys:  # the next call then begins with a key frame, and sends none again
            last = frames[keys[-1]].sequence - 1
            del frames[keys[-1] :]
        read, share = {frame.sequence for frame in frames}, bisect_right(pending, last)
        if not read & set(pending):
            self._spool.done(part, last, read, 0)
            return
        over, silent = threading.Event(), False
        usual = patience_s(2 * max(len(frame.payload) for frame in frames))  # so many may be on the way
        patience = max(usual, self._needs_s)
        self._moved, self._longest_s = time.monotonic(), 0.0
        try:
            self._channel = self._channel or open_channel(self._address, self._tls)
            call = CamerasStub(self._channel).Backlog.future(self._requests(segment.hello, frames, over))
            while not (call.done() or silent or self._stop.wait(_POLL_S / 10)):
                silent = time.monotonic() - self._moved > patience
                self._spool.tend()
            if not call.done():
                call.cancel()
            response = call.result()
        except SinkError as error:
            self._refused(part, grpc.StatusCode.UNAUTHENTICATED, str(error))
        except grpc.FutureCancelledError:
            if silent:  # it may be this part on which it hangs, or too much at once
                self._tell(f"{self._address}: the server has answered nothing for {patience:.0f} s", "silent")
                if share > 1:
                    self._most = share // 2
                else:
                    self._needs_s = min(2 * patience, _LONGEST_PATIENCE_S)
                self._try_later(part, REFUSED_WAIT_S, self._backoff.wait())
            else:
                self._spool.put_back(part)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            self._refused(part, error.code(), f"{self._address}: {error.details()}")
        else:
            self._answered(share, usual)
            if last == pending[-1]:
                self._told.clear()
            self._spool.done(part, last, read, response.recorded)
        finally:
            over.set()

    def _answered(self, share: int, usual_s: float) -> None:
        """Choose how many frames the next call has: so many that half the patience will do."""
        self._backoff.reset()
        longest_s = max(self._longest_s, time.monotonic() - self._moved)
        self._needs_s = 2 * longest_s
        if longest_s < usual_s / 4:
            self._most = max(self._most, 2 * share)
        elif longest_s > usual_s / 2:
            self._most = max(1, int(share * usual_s / 2 / longest_s))

    def _requests(
        self, hello: pb.Hello, frames: Sequence[pb.Frame], over: threading.Event
    ) -> Iterator[pb.PublishRequest]:
        yield pb.PublishRequest(hello=hello)
        for frame in frames:
            self._longest_s = max(self._longest_s, time.monotonic() - self._moved)
            while time.monotonic() < self._due or not self._flows():
                self._moved = time.monotonic()
                rest = self._due - time.monotonic()
                if over.wait(min(_POLL_S, rest) if rest > 0 else _POLL_S / 10):
                    return
            self._moved = time.monotonic()
            self._due = max(self._due + 1 / self._rate, self._moved)
            yield pb.PublishRequest(frame=frame)

    def _refused(self, part: Part, status: grpc.StatusCode, problem: str) -> None:
        if status not in _PASSING:
            self._tell(f"{problem} ({status.name})", status.name)
        of_the_part = status not in _PASSING | _LASTING  # others may not meet it
        wait_s = REFUSED_WAIT_S if status in _LASTING else self._backoff.wait()
        self._try_later(part, REFUSED_WAIT_S if of_the_part else 0.0, wait_s)

    def _try_later(self, part: Part, part_s: float, any_s: float) -> None:
        """This part not before ``part_s`` seconds, any not before ``any_s``."""
        self._hang_up()
        self._spool.put_back(part, part_s)
        self._not_before = time.monotonic() + any_s

    def _tell(self, problem: str, reason: str) -> None:
        """One line for each reason, until a part is through."""
        if reason not in self._told:
            self._told.add(reason)
            log.warning("backlog: %s; it waits in %s", problem, self._spool.path)

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
