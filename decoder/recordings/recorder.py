"""The recorder: frames of all cameras, as they came, into segments. The live stream never waits for it.

camera's stream ─▶ offer (bounded) ─▶ writer's thread ─▶ segment ─▶ flushed: kept, and told so
                     │ full: dropped, counted, and that camera is asked for a key frame to go on with
its backlog ─▶ offer_late (one at a time) ─▶ the same thread ─▶ segments of its own, that lie between the others in time

Here are the door, and the thread with the queue between them. ``track`` has what goes through it, ``looks`` what waits
until it is known what is recorded already, ``ends`` what ends a segment, ``writer`` how one is written.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from decoder.recordings.ends import SegmentLimits, take_step
from decoder.recordings.held import Held
from decoder.recordings.looks import LOOKED_S, Looked, Looks
from decoder.recordings.store import Store
from decoder.recordings.track import FAULT, Done, Offer, Recorded, Track, nobody
from decoder.recordings.writer import Writer
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.decode")

_TIDY_EVERY_S = 10.0
_TEND_EVERY_S = 0.5
_LIMITS = SegmentLimits()


class Recorder:
    """Records what it is offered until it is closed.

    What is public is for one thread, the service's, but for ``close``, which may wait in any. Methods with an
    underscore are for the writer's thread, as ``_writer`` and ``_looks`` are.

    Args:
        store: where to.
        limits: of a segment.
        waiting: bytes that may wait for the disk; beyond them frames are dropped.
    """

    def __init__(self, store: Store, limits: SegmentLimits = _LIMITS, waiting: int = 64 << 20) -> None:
        self._limits, self._most = limits, waiting
        self._tracks: dict[str, Track] = {}
        self._late: dict[str, Track] = {}
        self._queue: queue.SimpleQueue[Offer | Looked | None] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        held = Held()
        self._writer = Writer(store, limits, held, self._lock)
        self._looks = Looks(store, held, answer=self._queue.put, do=self._do)
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    def begin(
        self, hello: pb.Hello, ask_key: Callable[[], object], kept: Callable[[list[int]], object] = nobody
    ) -> None:
        """A camera's new stream; its first frame is a key frame.

        Args:
            hello: what it said.
            ask_key: asks the camera for a key frame; called from any thread.
            kept: is told the sequences of its frames that are flushed to disk; called from any thread.
        """
        self.end(hello.camera)
        old = self._tracks.get(hello.camera)
        self._tracks[hello.camera] = Track(hello, old.told if old else Recorded(), ask_key, kept)

    def end(self, camera: str, done: Done = nobody) -> None:
        """The camera's stream is over, and with it its segment."""
        if camera in self._tracks:
            self._queue.put(Offer(self._tracks[camera], done=done))

    def forget(self, camera: str) -> None:
        """The server no longer knows the camera; what was recorded of it stays."""
        self.end(camera, lambda _: self._writer.forget(camera))
        self._tracks.pop(camera, None)
        self._late.pop(camera, None)

    def miss(self, camera: str) -> None:
        """A frame of the camera's stream can't be recorded: it may come in a backlog, and the next is a key frame."""
        with self._lock:
            self._tracks[camera].gap = self._tracks[camera].needs_key = True

    def offer(self, camera: str, frame: pb.Frame, received_ns: int, levels: NDArray[np.int8] | None = None) -> bool:
        """Record a frame, unless the disk is too far behind.

        Args:
            camera: one that has begun.
            frame: the next of its stream.
            received_ns: since 1970, by this server's clock.
            levels: the frame's measurements; without them, a difference that is to begin a segment is dropped.

        Returns:
            Whether it is on its way.
        """
        track = self._tracks[camera]
        hole, was_set = take_step(track, frame.capture_time_ns, self._limits)
        if frame.kind == pb.FRAME_KIND_KEY or not (was_set or hole):
            levels = None
        size = len(frame.payload) + (levels.nbytes if levels is not None else 0)
        with self._lock:
            if track.needs_key and frame.kind != pb.FRAME_KIND_KEY:
                track.gap = True
                track.told.dropped += 1
                return False
            fits = self._waiting + size <= self._most
            track.needs_key = not fits
            apart = frame.backlog_before or track.gap
            if fits:
                track.gap = False
                self._waiting += size
            else:
                track.gap = True
                track.told.dropped += 1
        if not fits:
            track.ask_key()
            return False
        self._queue.put(Offer(track, frame, received_ns, size, apart, levels, hole=hole))
        return True

    def begin_late(self, hello: pb.Hello) -> Track:
        """A backlog of a camera that has begun; what it is to be offered with."""
        track = self._late.get(hello.camera)
        if track is None or track.hello != hello or track.problem is not None:
            told = self._tracks[hello.camera].told
            track = self._late[hello.camera] = Track(hello, told, late=True)
        return track

    def offer_late(self, track: Track, frame: pb.Frame, levels: NDArray[np.int8], received_ns: int, done: Done) -> None:
        """Record a frame of a backlog. The next is offered when this one is done.

        Args:
            track: of ``begin_late``.
            levels: the frame's measurements.
            done: called from any thread; it isn't flushed then.
        """
        self._queue.put(Offer(track, frame, received_ns, levels=levels, done=done))

    def flush_late(self, track: Track, done: Done) -> None:
        """Bring what was offered of a backlog onto the disk itself."""
        self._queue.put(Offer(track, done=done))

    def told(self) -> dict[str, Recorded]:
        """How each camera's recording fares."""
        return {camera: track.told for camera, track in self._tracks.items()}

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, and end."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _write_all(self) -> None:
        """What the writer's thread does. Nothing ends it but ``close``: it is the only one, of all cameras."""
        tidied = tended = -math.inf
        going = True
        while going:
            try:
                now = time.monotonic()
                if now - tidied > _TIDY_EVERY_S:
                    tidied = now
                    self._writer.tidy()
                if now - tended > _TEND_EVERY_S:
                    tended = now
                    self._looks.tend(now)
                    self._writer.tend(now)
                going = self._take_next(_TEND_EVERY_S if self._writer.open or self._looks.parked else _TIDY_EVERY_S)
            except Exception:  # noqa: BLE001 - whatever it is, what comes next may be recorded all the same
                self._writer.fault("recordings: a fault; recording goes on")
        try:
            self._take_parked()
        except Exception:  # what is open is to be finished
            log.exception("recordings: what waited at the end isn't recorded")
        self._writer.close()
        self._looks.close()

    def _take_next(self, timeout: float) -> bool:
        """Do what is next in the queue, if anything comes in time; False at the end of all."""
        try:
            offer = self._queue.get(timeout=timeout)
        except queue.Empty:
            return True
        if isinstance(offer, Looked):
            self._looks.unpark(offer)
        elif offer is not None:
            self._take(offer)
        return offer is not None

    def _take(self, offer: Offer) -> None:
        """Do what is offered, or let it wait until it is known what is recorded already."""
        if not self._looks.park(offer):
            self._do(offer)

    def _take_parked(self) -> None:
        """The last of what waits to be known is waited for, for a while; then what is live is recorded all the same."""
        until = time.monotonic() + LOOKED_S
        while self._looks.parked and (left := until - time.monotonic()) > 0:
            self._take_next(left)
        self._looks.give_up()

    def _do(self, offer: Offer) -> None:
        """Write a frame, end a stream or flush a backlog; whoever waits for it is told, however it goes."""
        problem: str | None = FAULT
        try:
            with self._lock:
                self._waiting -= offer.size
            problem = self._writer.do(offer)
        except Exception:  # noqa: BLE001 - what else waits is to be done all the same
            self._writer.fault("recording of camera %s: a fault; recording goes on", offer.track.hello.camera)
        finally:
            offer.done(problem)
