"""Where messages go: a connection to a decoder service, or a file that holds the same messages."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from encoder.tls import Tls, TlsError, why_not
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
UNANSWERED_S = 20.0
"""A server that has frames to acknowledge and says nothing for so long is taken for gone."""
UNSETTLED_S = 60.0
"""The same in a lossless stream, for a frame that isn't settled: an engine may take a while to be rebuilt."""
UNACKNOWLEDGED_FRAMES = 8
"""Frames on the way at most: a slow network delays a picture by no more than these."""
ON_WAY_S = 1.0
"""No more than the way carries in so long, and there and back, is on it, but for one frame, however large that is."""

_ASSUMED_BYTES_PER_S = 32_000.0
"""What a way carries of which nothing is known yet."""
_SLOWEST_BYTES_PER_S = 4_000.0
"""On a way that carries less a large frame takes too long: it is as good as gone."""
_ROUND_TRIPS, _LONGEST_ROUND_TRIP_S = 64, 2.0
"""The way there and back is the least of so many frames'; what takes longer is a way that is full, or mute."""
_LONGEST_NEED_S = 10.0
_SLICE_S = 0.1
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Each connection is one of its own, not one that a channel closed before has left behind.
    ("grpc.use_local_subchannel_pool", 1),
]


class SinkError(Exception):
    """The server isn't there, refused or went away, or the file can't be written; the message says which.

    Args:
        problem: the message.
        status: what the server ended the stream with, UNAUTHENTICATED also if TLS can't come about; None if neither.
        known: the message says why no connection comes about, and not only that none does.
    """

    def __init__(self, problem: str, status: grpc.StatusCode | None = None, known: bool = False) -> None:
        super().__init__(problem)
        self.status, self.known = status, known


@dataclass(frozen=True)
class Progress:
    """What the other side has told of the stream so far."""

    received: int = 0
    shown: int = 0
    dropped: int = 0
    settled: int = 0
    """Sequence up to which every frame was shown, dropped, or passed by since nobody watched."""
    unwatched: int = 0

    def then(self, later: "Progress") -> "Progress":
        """This, and after it a stream that told of ``later``: sequences go on, counts begin anew."""
        return Progress(
            max(self.received, later.received),
            max(self.shown, later.shown),
            self.dropped + later.dropped,
            max(self.settled, later.settled),
            self.unwatched + later.unwatched,
        )


class Sink(Protocol):
    """What the pipeline needs of each."""

    name: str

    @property
    def progress(self) -> Progress: ...

    @property
    def away(self) -> bool:
        """Whether frames have nowhere to go for now, and are to be dropped."""
        ...

    def wait_until_ready(self, timeout: float) -> bool: ...

    def take_changes(self) -> set[int]: ...

    def take_lost(self) -> bool:
        """Whether the frame sent last, in a lossless stream, is to be sent again as a key frame; says so once."""
        ...

    def resize(self, width: int, height: int) -> bool:
        """Take frames of another size from now on; False if it can't."""
        ...

    def send(self, message: pb.PublishRequest) -> bool:
        """Whether it is on its way; False if it waits for later."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Waiting:
    """A frame on the way.

    Attributes:
        size: in bytes.
        ahead: bytes on the way with it, its own too, when it was sent.
        since: when that was, by the monotonic clock.
    """

    sequence: int
    size: int
    ahead: int
    since: float


class ServerSink:
    """A connection to a decoder service; over when that is over.

    Args:
        address: ``HOST:PORT``.
        hello: sent first.
        lossless: send a frame once the one before it is settled, so that every one is shown to whoever watches.
        stop: set from another thread, gives up connecting.
        tls: what is shown to the server and whom it is taken for; none speaks no TLS.
        kept: is told which frames the server keeps, in another thread.

    Raises:
        SinkError: no service answers there, or it refuses the hello.
    """

    away = False

    def __init__(
        self, address: str, hello: pb.Hello, lossless: bool = False, stop: threading.Event | None = None,
        tls: Tls | None = None, kept: Callable[[Sequence[pb.Sequences]], object] | None = None,
    ) -> None:  # fmt: skip
        self.name = address
        self._kept = kept
        self._lossless = lossless
        self._stop = stop or threading.Event()
        self._sent = 0
        self._waiting: deque[_Waiting] = deque()
        self._carries = _ASSUMED_BYTES_PER_S
        self._round_trips: deque[float] = deque(maxlen=_ROUND_TRIPS)
        self._short = False
        self._heard = self._moved = time.monotonic()
        self._progress = Progress()
        self._changes: set[int] = set()
        self._problem: SinkError | None = None
        self._news = threading.Condition()
        self._accepted = False
        self._over = False
        self._requests: queue.SimpleQueue[pb.PublishRequest | None] = queue.SimpleQueue()
        self._tls = tls
        self._channel = open_channel(address, tls)
        try:
            self._wait_for_channel()
        except SinkError:
            self._channel.close()
            raise
        self._requests.put(pb.PublishRequest(hello=hello))
        self._call = CamerasStub(self._channel).Publish(iter(self._requests.get, None))
        self._reader = threading.Thread(target=self._read, name="acknowledgements", daemon=True)
        self._reader.start()
        with self._news:
            deadline = time.monotonic() + CONNECT_TIMEOUT_S
            while not (self._accepted or self._over or self._stop.is_set() or time.monotonic() > deadline):
                self._news.wait(_SLICE_S)
        if not self._accepted or self._problem:
            self.drop()
            raise self._problem or SinkError(f"{address}: the service doesn't answer the hello")

    @property
    def progress(self) -> Progress:
        return self._progress

    @property
    def last_sent(self) -> int:
        """Sequence of the frame sent last."""
        return self._sent

    @property
    def unacknowledged(self) -> int:
        """Frames sent that the server hasn't told to have, or in a lossless stream not to be through with."""
        with self._news:
            return len(self._waiting)

    def wait_until_ready(self, timeout: float) -> bool:
        """Wait for room on the way; False when there is none yet.

        Raises:
            SinkError: the server ended the stream, or it is gone.
        """
        with self._news:
            ready = self._news.wait_for(lambda: self._over or self._room(), timeout)
            silent = self.is_silent(patience_s(self._on_way))
            stuck = self._lossless and bool(self._waiting) and time.monotonic() - self._heard > UNSETTLED_S
        if self._over:
            raise self._problem or SinkError(f"{self.name}: the server ended the stream")
        if silent:
            seconds = time.monotonic() - self._heard
            raise SinkError(f"{self.name}: the server has acknowledged nothing for {seconds:.0f} s")
        if stuck:
            raise SinkError(f"{self.name}: the server has settled nothing for {UNSETTLED_S:.0f} s")
        return ready

    @property
    def has_room(self) -> bool:
        """Whether a frame could be sent now."""
        with self._news:
            return not self._over and self._room()

    @property
    def needs_s(self) -> float:
        """Seconds that the way needs for what is on it, there and back, by what it carried lately; if it was mute, no
        more than ten."""
        with self._news:
            return min(self._round_trip_s + self._on_way / self._carries, _LONGEST_NEED_S)

    def is_silent(self, seconds: float) -> bool:
        """Whether the server has frames to acknowledge and has said nothing for so long."""
        return self._sent > self._progress.received and time.monotonic() - self._heard > seconds

    def take_changes(self) -> set[int]:
        """Changes that the server asked for since the last call."""
        with self._news:
            changes, self._changes = self._changes, set()
        return changes

    def take_lost(self) -> bool:
        return False

    def resize(self, width: int, height: int) -> bool:
        return False

    def send(self, message: pb.PublishRequest) -> bool:
        with self._news:
            if self._sent <= self._progress.received:
                self._heard = time.monotonic()
            self._sent = message.frame.sequence
            size = len(message.frame.payload)
            self._waiting.append(_Waiting(self._sent, size, self._on_way + size, time.monotonic()))
        self._requests.put(message)
        return True

    def drop(self) -> None:
        """End it at once, whatever is on the way."""
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()
        self._reader.join(CLOSE_TIMEOUT_S)

    def close(self) -> None:
        """Say that no more frames come, and wait until the last one is settled, within a limit.

        Raises:
            SinkError: frames were sent that the server never acknowledged.
        """
        with self._news:
            self._news.wait_for(lambda: self._over or self._progress.settled >= self._sent, CLOSE_TIMEOUT_S)
        self._requests.put(None)
        self._reader.join(CLOSE_TIMEOUT_S)
        problem = self._problem  # what comes of closing the channel is not the server's
        self._channel.close()
        if lost := self.unacknowledged:
            told = str(problem or f"{self.name}: the server ended the stream")
            raise SinkError(f"{told}; frames that it never acknowledged: {lost}", getattr(problem, "status", None))

    def _wait_for_channel(self) -> None:
        """What no waiting mends is told as soon as a connection fails; a server that isn't there may still come."""
        states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
        put, deadline = states.put, time.monotonic() + CONNECT_TIMEOUT_S
        self._channel.subscribe(put, try_to_connect=True)
        try:
            while True:
                try:
                    state = states.get(timeout=_SLICE_S)
                except queue.Empty:
                    state = None
                if state is grpc.ChannelConnectivity.READY:
                    return
                over = self._stop.is_set() or time.monotonic() > deadline
                if not over and state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                    continue
                if told := None if self._stop.is_set() else why_not(self.name, self._tls):
                    status = None if told.passes else grpc.StatusCode.UNAUTHENTICATED
                    raise SinkError(f"{self.name}: {told.why}", status, known=True)
                if over:
                    raise SinkError(f"{self.name}: no decoder service answers (start one with veilcam-decode)")
        finally:
            self._channel.unsubscribe(put)

    def _room(self) -> bool:
        if self._lossless:
            return self._sent <= self._progress.settled
        if not self._waiting:
            return True
        within_s = ON_WAY_S + self._round_trip_s
        fresh = time.monotonic() - self._waiting[0].since < within_s
        if not fresh or self._on_way >= self._carries * within_s:
            self._short = True
            return False
        return len(self._waiting) < UNACKNOWLEDGED_FRAMES

    @property
    def _round_trip_s(self) -> float:
        """What a frame of no size takes there, and its acknowledgement back."""
        return min(self._round_trips, default=0.0)

    @property
    def _on_way(self) -> int:
        return sum(each.size for each in self._waiting)

    def _arrived(self, sequence: int) -> None:
        """The frames up to this one aren't on the way any more: what it carries is measured by them.

        Only while more was to be sent: else it is what was sent, and says no more than that it carries so much. A short
        time says little: acknowledgements of frames that arrived one by one may come together.
        """
        now, size, free_at = time.monotonic(), 0, self._moved
        while self._waiting and self._waiting[0].sequence <= sequence:
            first = self._waiting.popleft()
            round_trip_s = now - first.since - first.ahead / self._carries
            self._round_trips.append(min(max(0.0, round_trip_s), _LONGEST_ROUND_TRIP_S))
            if not size and first.since > free_at:
                free_at = first.since + self._round_trip_s
            size += first.size
        if size:
            took = max(now - free_at, 1e-6)
            if self._short or size / took > self._carries:
                measured = self._carries + min(1.0, took) * (size / took - self._carries)
                self._carries = max(measured, _SLOWEST_BYTES_PER_S)
            self._moved, self._short = now, False

    def _read(self) -> None:
        problem = None
        try:
            for response in self._call:
                with self._news:
                    self._accepted = True
                    self._heard = time.monotonic()
                    if response.HasField("acknowledgement"):
                        told = response.acknowledgement
                        self._progress = Progress(told.received, told.shown, told.dropped, told.settled, told.unwatched)
                        self._changes.update(told.changes)
                        self._arrived(told.settled if self._lossless else told.received)
                    self._news.notify_all()
                if self._kept and response.acknowledgement.kept:
                    self._kept(response.acknowledgement.kept)
        except grpc.RpcError as error:
            problem = SinkError(f"{self.name}: {_explained(error)}", error.code())
        finally:
            with self._news:
                self._problem = problem
                self._over = True
                self._news.notify_all()


class FileSink:
    """A file of length-prefixed ``veilcam.v1.PublishRequest`` messages: what a server would have been sent."""

    away = False

    def __init__(self, path: Path, hello: pb.Hello) -> None:
        self.name = str(path)
        self._sent = 0
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise SinkError(f"{path}: can't be written ({error.strerror})") from None
        self._write(pb.PublishRequest(hello=hello))

    @property
    def progress(self) -> Progress:
        return Progress(received=self._sent, settled=self._sent)

    def wait_until_ready(self, timeout: float) -> bool:
        return True

    def take_changes(self) -> set[int]:
        return set()

    def take_lost(self) -> bool:
        return False

    def resize(self, width: int, height: int) -> bool:
        return False

    def send(self, message: pb.PublishRequest) -> bool:
        self._write(message)
        self._sent = message.frame.sequence
        return True

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise SinkError(f"{self.name}: {error.strerror}") from None

    def _write(self, message: pb.PublishRequest) -> None:
        try:
            serialize_length_prefixed(message, self._file)  # type: ignore[arg-type]
            self._file.flush()
        except OSError as error:
            raise SinkError(f"{self.name}: {error.strerror}") from None


def read_messages(path: Path) -> Iterator[pb.PublishRequest]:
    """The messages of a file that ``FileSink`` wrote."""
    with path.open("rb") as file:
        while message := parse_length_prefixed(pb.PublishRequest, file):  # type: ignore[arg-type]
            yield message


def patience_s(size: int) -> float:
    """How long a server may say nothing while so many bytes are on the way to it."""
    return UNANSWERED_S + size / _SLOWEST_BYTES_PER_S


def open_channel(address: str, tls: Tls | None) -> grpc.Channel:
    """A channel of its own to a decoder service, which connects when it is used.

    Raises:
        SinkError: the files of ``tls`` aren't what they should be any more.
    """
    if tls is None:
        return grpc.insecure_channel(address, _OPTIONS)
    try:
        return grpc.secure_channel(address, tls.credentials(), _OPTIONS)
    except TlsError as error:
        raise SinkError(f"{address}: {error}", grpc.StatusCode.UNAUTHENTICATED, known=True) from None


def _explained(error: grpc.RpcError) -> str:
    assert isinstance(error, grpc.Call)
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"the server went away ({details})"
    hint = "; choose another --name" if code is grpc.StatusCode.ALREADY_EXISTS else ""
    return f"the server refused: {code.name}, {details}{hint}"
