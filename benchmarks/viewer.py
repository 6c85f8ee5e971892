"""A viewer of one camera in a thread: what it saw, how late, and in which order."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import grpc

from benchmarks.processes import ProcessError
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub

PATIENCE_S = 120.0
"""What hasn't come about by then doesn't."""
LATELY = 20
"""Pictures by which latency and rate are judged."""
_REMEMBERED = 2000


@dataclass(frozen=True)
class Seen:
    """A picture, as the viewer noted it."""

    sequence: int
    captured_ns: int
    seen_ns: int


class Viewer:
    """What one viewer sees of a camera; who is let go comes back.

    Args:
        address: of the service.
        camera: its name.
        pause_s: between two pictures that it reads.
    """

    def __init__(self, address: str, camera: str, pause_s: float = 0.0) -> None:
        self._address, self._camera, self._pause_s = address, camera, pause_s
        self.seen: deque[Seen] = deque(maxlen=_REMEMBERED)
        """The newest pictures, in the order in which they came."""
        self.disordered: list[tuple[int, int]] = []
        """Pictures seen twice or after a later one: the number of the one before, and theirs."""
        self._over = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def lately(self, since_ns: int = 0) -> dict[str, float]:
        """Of the last pictures that were captured since a time: median latency and frames a second.

        Returns:
            Nothing if fewer than two came.
        """
        last = [each for each in list(self.seen)[-LATELY:] if each.captured_ns >= since_ns]
        if len(last) < 2:
            return {}
        seconds = (last[-1].seen_ns - last[0].seen_ns) / 1e9
        return {
            "latency_ms": round(median((each.seen_ns - each.captured_ns) / 1e6 for each in last), 1),
            "fps": round((len(last) - 1) / max(seconds, 1e-3), 1),
        }

    def wait(self, until: Callable[[deque[Seen]], bool]) -> bool:
        """Wait until there are pictures and a condition holds: whether it came about within a long while."""
        deadline = time.monotonic() + PATIENCE_S
        while not (self.seen and until(self.seen)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def expect(self, until: Callable[[deque[Seen]], bool], problem: str) -> None:
        """Wait for what all else needs.

        Raises:
            ProcessError: it didn't come about; with the problem.
        """
        if not self.wait(until):
            raise ProcessError(f"{self._camera}: {problem}")

    def disorder(self) -> Iterator[str]:
        """One line if pictures were seen twice or after a later one."""
        if self.disordered:
            before, after = self.disordered[0]
            yield f"{len(self.disordered)} pictures were shown twice or out of order, first {after} after {before}"

    def close(self) -> None:
        """Look no longer."""
        self._over.set()
        if self._call is not None:
            self._call.cancel()
        self._thread.join()

    def _watch(self) -> None:
        with grpc.insecure_channel(self._address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            while not self._over.is_set():
                self._call = ViewersStub(channel).Watch(pb.WatchRequest(camera=self._camera))
                with contextlib.suppress(grpc.RpcError):  # not there yet, or let go: asked again
                    for picture in self._call:
                        self._note(picture)
                        if self._over.wait(self._pause_s):
                            break
                self._over.wait(0.1)

    def _note(self, picture: pb.Picture) -> None:
        if self.seen and picture.sequence <= self.seen[-1].sequence:
            self.disordered.append((self.seen[-1].sequence, picture.sequence))
        self.seen.append(Seen(picture.sequence, picture.capture_time_ns, time.time_ns()))


@contextmanager
def viewing(address: str, camera: str, pause_s: float = 0.0) -> Iterator[Viewer]:
    """A viewer while the context lasts."""
    viewer = Viewer(address, camera, pause_s)
    try:
        yield viewer
    finally:
        viewer.close()
