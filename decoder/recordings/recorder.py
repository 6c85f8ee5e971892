"""The recorder: frames of all cameras, as they came, into segments. The live stream never waits for it.

camera's stream ─▶ offer (bounded) ─▶ writer thread ─▶ segment
                     │ full: dropped, counted, and that camera is asked for a key frame to go on with
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from protos.segment import SegmentWriter
from decoder.recordings.store import Store
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.decode")

_TIDY_EVERY_S = 10.0
_FLUSH_EVERY_S = 2.0


@dataclass(frozen=True)
class SegmentLimits:
    """When a segment ends and the next begins, at the next key frame."""

    seconds: float = 600.0
    megabytes: float = 64.0


@dataclass
class Recorded:
    """How a camera's recording fares."""

    frames: int = 0
    bytes: int = 0
    dropped: int = 0
    """Received but not recorded, because the disk couldn't keep up or was full."""


@dataclass(eq=False)
class _Track:
    """One stream of a camera on its way to disk."""

    hello: pb.Hello
    ask_key: Callable[[], object]
    told: Recorded
    needs_key: bool = True
    writer: SegmentWriter | None = None
    began: float = 0.0
    flushed: float = 0.0


class Recorder:
    """Records what it is offered until it is closed.

    Args:
        store: where to.
        limits: of a segment.
        waiting: bytes that may wait for the disk; beyond them frames are dropped.
    """

    def __init__(self, store: Store, limits: SegmentLimits = SegmentLimits(), waiting: int = 64 << 20) -> None:
        self._store, self._limits, self._most = store, limits, waiting
        self._tracks: dict[str, _Track] = {}
        self._queue: queue.SimpleQueue[tuple[_Track, pb.Frame | None, int] | None] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._broken = False
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    def begin(self, hello: pb.Hello, ask_key: Callable[[], object]) -> None:
        """A camera's new stream; its first frame is a key frame.

        Args:
            hello: what it said.
            ask_key: asks the camera for a key frame; called from any thread.
        """
        self.end(hello.camera)
        old = self._tracks.get(hello.camera)
        self._tracks[hello.camera] = _Track(hello, ask_key, old.told if old else Recorded())

    def end(self, camera: str) -> None:
        """The camera's stream is over, and with it its segment."""
        if camera in self._tracks:
            self._queue.put((self._tracks[camera], None, 0))

    def forget(self, camera: str) -> None:
        """The server no longer knows the camera; what was recorded of it stays."""
        self.end(camera)
        self._tracks.pop(camera, None)

    def offer(self, camera: str, frame: pb.Frame, received_ns: int) -> bool:
        """Record a frame, unless the disk is too far behind. Returns whether it is on its way."""
        track, size = self._tracks[camera], len(frame.payload)
        with self._lock:
            if track.needs_key and frame.kind != pb.FRAME_KIND_KEY:
                track.told.dropped += 1
                return False
            fits = self._waiting + size <= self._most
            track.needs_key = not fits
            if fits:
                self._waiting += size
            else:
                track.told.dropped += 1
        if not fits:
            track.ask_key()
            return False
        self._queue.put((track, frame, received_ns))
        return True

    def told(self) -> dict[str, Recorded]:
        """How each camera's recording fares."""
        return {camera: track.told for camera, track in self._tracks.items()}

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, and end."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _write_all(self) -> None:
        open_tracks: set[_Track] = set()
        tidied = 0.0
        while (item := self._queue.get()) is not None:
            track, frame, received_ns = item
            if frame is None:
                self._finish(track)
                open_tracks.discard(track)
                continue
            with self._lock:
                self._waiting -= len(frame.payload)
            open_tracks.add(track)
            now = time.monotonic()
            if now - tidied > _TIDY_EVERY_S:
                tidied = now
                self._tidy(open_tracks)
            try:
                self._write(track, frame, received_ns, now)
            except OSError as error:
                self._failed(track, error, open_tracks)
        for track in open_tracks:
            self._finish(track)

    def _write(self, track: _Track, frame: pb.Frame, received_ns: int, now: float) -> None:
        key = frame.kind == pb.FRAME_KIND_KEY
        if track.writer is not None and self._is_full(track.writer, now - track.began):
            if key:
                self._finish(track)
            else:
                track.ask_key()
        if track.writer is None:
            if not key:  # what it is a difference to was never written
                with self._lock:
                    track.told.dropped += 1
                return
            path = self._store.place(track.hello.camera, frame.capture_time_ns)
            track.writer, track.began, track.flushed = SegmentWriter(path, track.hello), now, now
        before = track.writer.size
        track.writer.append(frame, received_ns)
        with self._lock:
            track.told.frames += 1
            track.told.bytes += track.writer.size - before
        if now - track.flushed > _FLUSH_EVERY_S:
            track.flushed = now
            track.writer.flush()
        if self._broken:
            self._broken = False
            log.info("recording goes on")

    def _failed(self, track: _Track, error: OSError, open_tracks: set[_Track]) -> None:
        """A frame couldn't be written: its segment ends, old ones make room, and the camera starts with a key frame."""
        if not self._broken:
            self._broken = True
            log.error("recording of camera %s: %s; live pictures go on", track.hello.camera, error.strerror or error)
        self._finish(track)
        with self._lock:
            track.told.dropped += 1
            track.needs_key = True
        self._tidy(open_tracks, full=True)
        track.ask_key()

    def _is_full(self, writer: SegmentWriter, seconds: float) -> bool:
        return seconds > self._limits.seconds or writer.size > self._limits.megabytes * (1 << 20)

    def _finish(self, track: _Track) -> None:
        writer, track.writer = track.writer, None
        if writer is None:
            return
        try:
            writer.flush()
        except OSError as error:
            log.error("recording %s: %s", writer.path, error.strerror or error)
        finally:
            writer.close()

    def _tidy(self, open_tracks: set[_Track], full: bool = False) -> None:
        writing = {track.writer.path for track in open_tracks if track.writer is not None}
        try:
            self._store.tidy(writing, full)
        except OSError as error:
            log.error("recordings in %s can't be tidied: %s", self._store.folder, error.strerror or error)
