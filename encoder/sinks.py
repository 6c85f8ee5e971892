"""Where messages go: a decoder service, or a file that holds the same messages."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from encoder.tls import Tls, why_not
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
UNACKNOWLEDGED_FRAMES = 8
"""Frames on the way at most: a slow network delays a picture by no more than these."""


class SinkError(Exception):
    """The server isn't there, refused or went away, or the file can't be written; the message says which."""


@dataclass(frozen=True)
class Progress:
    """What the other side has told of the stream so far."""

    received: int = 0
    shown: int = 0
    dropped: int = 0
    settled: int = 0
    """Sequence up to which every frame was shown, dropped, or passed by since nobody watched."""
    unwatched: int = 0


class Sink(Protocol):
    """What the pipeline needs of either."""

    name: str

    @property
    def progress(self) -> Progress: ...

    def wait_until_ready(self, timeout: float) -> bool: ...

    def take_changes(self) -> set[int]: ...

    def send(self, message: pb.PublishRequest) -> None: ...

    def close(self) -> None: ...


class ServerSink:
    """A stream to a decoder service.

    Args:
        address: ``HOST:PORT``.
        hello: sent first.
        lossless: send a frame once the one before it is settled, so that every one is shown to whoever watches.
        tls: what is shown to the server and whom it is taken for; none speaks no TLS.

    Raises:
        SinkError: no service answers there, or it refuses the hello.
    """

    def __init__(self, address: str, hello: pb.Hello, lossless: bool = False, tls: Tls | None = None) -> None:
        self.name = address
        self._lossless = lossless
        self._sent = 0
        self._progress = Progress()
        self._changes: set[int] = set()
        self._problem: SinkError | None = None
        self._news = threading.Condition()
        self._accepted = False
        self._over = False
        self._requests: queue.SimpleQueue[pb.PublishRequest | None] = queue.SimpleQueue()
        options = [("grpc.max_send_message_length", -1), ("grpc.keepalive_time_ms", 10_000)]
        self._channel = (
            grpc.secure_channel(address, tls.credentials(), options) if tls else grpc.insecure_channel(address, options)
        )
        try:
            grpc.channel_ready_future(self._channel).result(CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            self._channel.close()
            problem = why_not(address, tls) or "no decoder service answers (start one with veilcam-decode)"
            raise SinkError(f"{address}: {problem}") from None
        self._requests.put(pb.PublishRequest(hello=hello))
        self._call = CamerasStub(self._channel).Publish(iter(self._requests.get, None))
        self._reader = threading.Thread(target=self._read, name="acknowledgements", daemon=True)
        self._reader.start()
        with self._news:
            answered = self._news.wait_for(lambda: self._accepted or self._over, CONNECT_TIMEOUT_S)
        if not answered or self._problem:
            self.close()
            raise self._problem or SinkError(f"{address}: the service doesn't answer the hello")

    @property
    def progress(self) -> Progress:
        return self._progress

    def wait_until_ready(self, timeout: float) -> bool:
        """Wait for room on the way; False when there is none yet.

        Raises:
            SinkError: the server ended the stream, or it is gone.
        """
        with self._news:
            ready = self._news.wait_for(lambda: self._over or self._room(), timeout)
        if self._over:
            raise self._problem or SinkError(f"{self.name}: the server ended the stream")
        return ready

    def take_changes(self) -> set[int]:
        """Changes that the server asked for since the last call."""
        with self._news:
            changes, self._changes = self._changes, set()
        return changes

    def send(self, message: pb.PublishRequest) -> None:
        self._sent = message.frame.sequence
        self._requests.put(message)

    def close(self) -> None:
        """Say that no more frames come, and wait until the last one is settled, within a limit."""
        with self._news:
            self._news.wait_for(lambda: self._over or self._progress.settled >= self._sent, CLOSE_TIMEOUT_S)
        self._requests.put(None)
        self._reader.join(CLOSE_TIMEOUT_S)
        self._channel.close()

    def _room(self) -> bool:
        if self._lossless:
            return self._sent <= self._progress.settled
        return self._sent < self._progress.received + UNACKNOWLEDGED_FRAMES

    def _read(self) -> None:
        problem = None
        try:
            for response in self._call:
                with self._news:
                    self._accepted = True
                    if response.HasField("acknowledgement"):
                        told = response.acknowledgement
                        self._progress = Progress(told.received, told.shown, told.dropped, told.settled, told.unwatched)
                        self._changes.update(told.changes)
                    self._news.notify_all()
        except grpc.RpcError as error:
            problem = SinkError(f"{self.name}: {_explained(error)}")
        finally:
            with self._news:
                self._problem = problem
                self._over = True
                self._news.notify_all()


class FileSink:
    """A file of length-prefixed ``veilcam.v1.PublishRequest`` messages: what a server would have been sent."""

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
        return Progress(received=self._sent)

    def wait_until_ready(self, timeout: float) -> bool:
        return True

    def take_changes(self) -> set[int]:
        return set()

    def send(self, message: pb.PublishRequest) -> None:
        self._write(message)
        self._sent = message.frame.sequence

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


def _explained(error: grpc.RpcError) -> str:
    assert isinstance(error, grpc.Call)
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"the server went away ({details})"
    hint = "; choose another --name" if code is grpc.StatusCode.ALREADY_EXISTS else ""
    return f"the server refused: {code.name}, {details}{hint}"
