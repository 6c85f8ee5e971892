"""Who comes to the service of ``faults``: cameras led by hand, a viewer that reads all, viewers that stop reading."""

import contextlib
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
import numpy as np

from benchmarks.damage import message
from benchmarks.processes import Service
from encoder.cli import DEFAULT_OPERATOR
from encoder.packing import Packer
from encoder.sampling import Operator
from encoder.sources import open_source
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub

WIDTH, HEIGHT, RATE = 320, 240, 10
CALM = "calm"
"""The camera that nothing is wrong with."""
PATIENCE_S = 20.0
"""An answer that takes longer is a wait without end."""
_SOUND = 32
"""Different sound frames."""
UNREAD = 4
"""Viewers of each way that stop reading."""
_STILLS = 400
"""Requests that one of them makes at once: more pictures than the kernel keeps for it."""
_GAP = 3
"""Pictures' times between two pictures that are called a gap."""
_NEW_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Told:
    """What came of a phase: answers by their kind, and how many never came."""

    answers: Counter[str] = field(default_factory=Counter)
    by_damage: dict[str, Counter[str]] = field(default_factory=dict)
    endless: int = 0
    problems: list[str] = field(default_factory=list)


class Line:
    """The stream of a camera; opened anew whenever the service has ended it.

    Args:
        channel: to the service.
        hello: what it says first.
        came: counts its waits without end.
    """

    def __init__(self, channel: grpc.Channel, hello: pb.Hello, came: Told) -> None:
        self._channel = channel
        self._publish: Any = channel.stream_stream("/veilcam.v1.Cameras/Publish")
        self._hello = pb.PublishRequest(hello=hello).SerializeToString()
        self._came = came
        self._call: Any = None
        self._sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[pb.Acknowledgement | str] = queue.SimpleQueue()

    def exchange(self, *frames: pb.Frame, between: bytes = b"") -> str:
        """Send sound frames, and perhaps something else before the last.

        Returns:
            The status that ended the stream, else ``shown`` or ``not shown`` of the last frame.
        """
        if refused := self.open():
            return refused
        *before, last = map(message, frames)
        for each in [*before, between, last] if between else [*before, last]:
            self._sent.put(each)
        sequence = frames[-1].sequence
        while True:
            told = self._answer()
            if isinstance(told, str):
                return told
            # Of a damaged number that was far ahead, the service tells before it has refused the sound ones.
            if told.received == sequence and told.settled >= sequence:
                return "shown" if told.shown == sequence else "not shown"

    def open(self) -> str:
        """Until the service takes the camera, whose name is free once it has noticed that the stream before is over.

        Returns:
            The status if it doesn't; else nothing.
        """
        while self._call is None:
            self._sent, self._answers = queue.SimpleQueue(), queue.SimpleQueue()
            self._sent.put(self._hello)
            self._call = self._publish(iter(self._sent.get, None))
            threading.Thread(target=_collect, args=(self._call, self._answers), daemon=True).start()
            told = self._answer()
            if isinstance(told, str):
                self._came.answers[f"{told} to a hello"] += 1
                if told != grpc.StatusCode.ALREADY_EXISTS.name:
                    return told
                time.sleep(0.05)
        return ""

    def close(self) -> str:
        """Say goodbye: the status."""
        self._sent.put(None)
        while self._call is not None:
            told = self._answer()
            if isinstance(told, str):
                return told
        return grpc.StatusCode.OK.name

    def cut(self) -> str:
        """Close the connection without a word."""
        self._call = None
        self._channel.close()
        return "cut"

    def _answer(self) -> pb.Acknowledgement | str:
        """The next one, or the status of a stream that is over."""
        try:
            told = self._answers.get(timeout=PATIENCE_S)
        except queue.Empty:
            self._came.endless += 1
            self._call.cancel()
            told = "no answer"
        if isinstance(told, str):
            self._sent.put(None)
            self._call = None
        return told


def _collect(call: Any, answers: "queue.SimpleQueue[pb.Acknowledgement | str]") -> None:
    with contextlib.suppress(grpc.RpcError):
        for each in call:
            answers.put(pb.PublishResponse.FromString(each).acknowledgement)
    answers.put(call.code().name)


class Frames:
    """Sound frames of the test pattern without end, each numbered on from the one before."""

    def __init__(self) -> None:
        self._made: dict[bool, list[pb.Frame]] = {}
        for key in (True, False):
            packer = Packer(_operator(), 0.1)
            source = open_source(f"pattern:{WIDTH}x{HEIGHT}#{_SOUND + 1}", paced=False)
            packed = [packer.pack(frame, index, key)[0] for index, frame in enumerate(source.frames(), 1)]
            source.close()
            self._made[key] = packed[1:]
        self._sequence = 0

    def next(self, key: bool = True) -> pb.Frame:
        """As a key frame, or as a difference to the one before."""
        self._sequence += 1
        frame = pb.Frame()
        frame.CopyFrom(self._made[key][self._sequence % _SOUND])
        frame.sequence, frame.capture_time_ns = self._sequence, time.time_ns()
        if frame.kind == pb.FRAME_KIND_DELTA:
            frame.base_sequence = self._sequence - 1
        return frame


def _operator() -> Operator:
    return Operator.load(DEFAULT_OPERATOR)


@contextmanager
def filmed(service: Service, camera: str, came: Told, operator_id: str = "") -> Iterator[Line]:
    """A connection with a camera and a viewer of it: what nobody looks at goes through no engine."""
    hello = pb.Hello(camera=camera, operator_id=operator_id or _operator().id, width=WIDTH, height=HEIGHT)
    with grpc.insecure_channel(service.address, _NEW_CONNECTION) as channel:
        line = Line(channel, hello, came)
        line.open()
        watching: Any = ViewersStub(channel).Watch(pb.WatchRequest(camera=camera))
        there = threading.Event()
        looking = threading.Thread(target=_look, args=(watching, there), daemon=True)
        looking.start()
        came.endless += not there.wait(PATIENCE_S)
        yield line
        line.close()
        watching.cancel()
        looking.join()


def _look(call: Any, there: threading.Event) -> None:
    with contextlib.suppress(grpc.RpcError):
        call.initial_metadata()  # comes once frames are decoded for this viewer, or with its refusal
        there.set()
        for _ in call:
            pass


class Viewer:
    """What the viewer of the calm camera notes, in its process."""

    def __init__(self, notes: "multiprocessing.Queue[tuple[int, float] | str]") -> None:
        self._notes = notes
        self._came: list[tuple[int, float]] = []
        self.let_go = ""

    def noted(self, begin_ns: int, end_ns: int) -> dict[str, Any]:
        """Of the pictures that came between two times; a gap counts where it ends."""
        while not self.let_go and (not self._came or self._came[-1][0] < end_ns):
            try:
                note = self._notes.get(timeout=PATIENCE_S)
            except queue.Empty:
                note = "no pictures"
            if isinstance(note, str):
                self.let_go = note
            else:
                self._came.append(note)
        times = [at for at, _ in self._came if at < end_ns]
        between = [(b - a) / 1e6 for a, b in pairwise(times) if b >= begin_ns]
        took = [latency for at, latency in self._came if begin_ns <= at < end_ns]
        return {
            "seconds": round((end_ns - begin_ns) / 1e9, 1),
            "fps": round(len(took) * 1e9 / (end_ns - begin_ns), 2),
            "gaps": sum(each > _GAP * 1e3 / RATE for each in between),
            "longest_gap_ms": round(max(between)) if between else None,
            "latency_ms": {
                name: round(float(np.percentile(took, q)), 1) if took else None
                for name, q in (("median", 50), ("p99", 99))
            },
        }


@contextmanager
def viewing(address: str) -> Iterator[Viewer]:
    """The viewer of the calm camera, in a process of its own that isn't held up by what this one does."""
    spawn = multiprocessing.get_context("spawn")
    notes: multiprocessing.Queue[tuple[int, float] | str] = spawn.Queue()
    process = spawn.Process(target=_note, args=(address, notes), daemon=True)
    process.start()
    try:
        yield Viewer(notes)
    finally:
        process.kill()
        process.join()


def _note(address: str, notes: "multiprocessing.Queue[tuple[int, float] | str]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with grpc.insecure_channel(address) as channel:
        try:
            for picture in ViewersStub(channel).Watch(pb.WatchRequest(camera=CALM)):
                now = time.time_ns()
                notes.put((now, (now - picture.capture_time_ns) / 1e6))
        except grpc.RpcError as error:
            notes.put(str(error.code()) if isinstance(error, grpc.Call) else str(error))


@contextmanager
def stalled(service: Service) -> Iterator[list[int]]:
    """Viewers of the calm camera that ask and then read no more, until the context is over.

    Calls that are never read in a process that goes on, calls of processes that stand still, MJPEG, and stills asked
    for many times at once: these by their ports.
    """
    stills: list[int] = []
    host, port = service.page.removeprefix("http://").split(":")
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(service.address, _NEW_CONNECTION))
        for _ in range(UNREAD):
            call = ViewersStub(channel).Watch(pb.WatchRequest(camera=CALM, encoding=pb.ENCODING_GRAY8))
            stack.callback(call.cancel)
        stack.enter_context(_standing_still(service.address))
        for path, times in [("mjpeg", 1)] * UNREAD + [("jpg", _STILLS)] * UNREAD:
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.setblocking(False)
            asked = f"GET /cameras/{CALM}.{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() * times
            connection.send(asked)
            if path == "jpg":
                stills.append(connection.getsockname()[1])
        yield stills


@contextmanager
def _standing_still(address: str) -> Iterator[None]:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_stand_still, args=(address,), daemon=True) for _ in range(UNREAD)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            os.waitid(os.P_PID, process.pid or 0, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _stand_still(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        call = ViewersStub(channel).Watch(pb.WatchRequest(camera=CALM, encoding=pb.ENCODING_GRAY8))
        next(call)
        os.kill(os.getpid(), signal.SIGSTOP)
