"""Frames of all cameras into segments, which are flushed, ended and tidied; whatever fails, the other cameras go on.

A frame that is recorded already is passed over. One that is a difference to such a frame is coded anew as a key frame.
"""

import logging
import math
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from decoder.admission import next_levels
from decoder.recordings.ends import SegmentLimits, ends_before
from decoder.recordings.held import Held
from decoder.recordings.store import Store
from decoder.recordings.track import FAULT, Offer, Track
from decoder.seldom import Seldom
from protos.payload import Payload, Plane, announcement
from protos.segment import SegmentWriter
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.decode")

_FLUSH_EVERY_S = 2.0
_LATE_IDLE_S = 30.0
"""A segment of a backlog ends when nothing came for so long."""
_MOST_LATE = 4
"""Segments of a camera's backlogs that are open at once; each run has its own."""
_ASK_AGAIN_S = 5.0
"""A camera that can't be recorded is asked for a key frame as often: each costs it as much as many other frames."""


class Writer:
    """Writes what it is offered. All of it is for one thread, the writer's, as ``held`` and ``open`` are.

    Args:
        store: where to.
        limits: of a segment.
        held: what is recorded already, kept up to date.
        lock: the recorder's, for what other threads change of a track as well.

    Attributes:
        open: tracks that may have a segment that isn't ended.
    """

    def __init__(self, store: Store, limits: SegmentLimits, held: Held, lock: threading.Lock) -> None:
        self._store, self._limits, self._held, self._lock = store, limits, held, lock
        self.open: set[Track] = set()
        self._broken: dict[str, float] = {}
        self._faults = Seldom()

    def do(self, offer: Offer) -> str | None:
        """Write a frame, end a stream or flush a backlog; returns why it couldn't be."""
        track, problem = offer.track, None
        try:
            if offer.frame is not None:
                self.open.add(track)
                self._write(offer, offer.frame)
            elif track.late:
                problem = self._or_part(track, self._flush) or track.problem
            else:
                problem = self._end(track)
                self.open.discard(track)
        except OSError as error:
            problem = error.strerror or str(error)
            self._failed(track, problem)
        except Exception:  # noqa: BLE001 - one frame's fault isn't to end what is recorded of all cameras
            problem = FAULT
            self.fault("recording of camera %s: a frame can't be written", track.hello.camera)
            self._failed(track, problem)
        return problem

    def tend(self, now: float) -> None:
        """Flush what was written a while ago, and end idle backlogs."""
        for track in list(self.open):
            if track.late and now - track.began > _LATE_IDLE_S:
                self._end(track)
                self.open.discard(track)
            elif track.unkept and now - track.flushed > _FLUSH_EVERY_S:
                self._or_part(track, self._flush)

    def tidy(self, full: bool = False) -> None:
        """Delete what is beyond what is kept, but for the segments that are open; some in any case on a full disk."""
        writing = {track.writer.path for track in self.open if track.writer is not None}
        try:
            for kept in self._store.tidy(writing, full):
                self._held.deleted(kept.camera, kept.path)
        except OSError as error:
            log.error("recordings in %s can't be tidied: %s", self._store.folder, error.strerror or error)

    def forget(self, camera: str) -> None:
        """What is known of a camera's recordings is to be found anew, when it is back."""
        self._held.forget(camera)
        self._broken.pop(camera, None)

    def fault(self, *told: str) -> None:
        """Tell of a fault of this program's, with all there is to know of it, from time to time."""
        if self._faults.now():
            log.exception(*told)

    def close(self) -> None:
        """End all segments."""
        for track in self.open:
            self._end(track)

    def _end(self, track: Track) -> str | None:
        """``_finish``, whatever fails."""
        return self._or_part(track, self._finish)

    def _or_part(self, track: Track, work: Callable[[Track], str | None]) -> str | None:
        """Flush or finish a track's segment, or part with it if that has a fault: others are to go on."""
        try:
            return work(track)
        except Exception:  # noqa: BLE001 - see above
            self.fault("recording of camera %s: its segment can't be flushed", track.hello.camera)
            self._part_with(track, FAULT)
            return FAULT

    def _write(self, offer: Offer, frame: pb.Frame) -> None:
        track, levels = offer.track, offer.levels
        now, camera, epoch = time.monotonic(), track.hello.camera, track.hello.epoch
        if not track.unkept:
            track.flushed = now
        if self._held.has(camera, epoch, frame.sequence):
            track.passed = (frame.sequence, levels if levels is not None else _levels_of(frame, track))
            track.unkept.append(frame.sequence)
            track.repeats = True
            with self._lock:
                track.told.repeated += 1
            return
        if ends_before(offer, frame, self._held, self._limits, now):
            self._finish(track)
        base = frame.base_sequence if frame.kind == pb.FRAME_KIND_DELTA else 0
        if base and (track.writer is None or track.last[0] != base):
            levels = levels if levels is not None else _levels_of(frame, track)
            if levels is None:  # what it is a difference to was never written
                with self._lock:
                    track.told.dropped += 1
                    track.needs_key = True
                track.ask_key()
                return
            frame = _as_key(frame, levels)
        track.passed = None
        before = track.writer.size if track.writer is not None else 0
        writer = track.writer or self._begin(track, frame.capture_time_ns, now)
        if track.late:
            track.began = now
        writer.append(frame, offer.received_ns)
        if track.span is None:
            track.span = self._held.begin(camera, epoch, writer.path, frame.sequence)
        else:
            self._held.add(camera, epoch, track.span, frame.sequence)
        track.last = frame.sequence, frame.capture_time_ns
        track.unkept.append(frame.sequence)
        with self._lock:
            track.told.frames += 1
            track.told.late += track.late
            track.told.bytes += writer.size - before
        if self._broken.pop(camera, None) is not None:
            log.info("recording of camera %s goes on", camera)

    def _begin(self, track: Track, start_ns: int, now: float) -> SegmentWriter:
        """A track's new segment, from when its first frame was captured."""
        if track.late:
            self._make_room(track)
        path = self._store.place(track.hello.camera, start_ns)
        track.writer, track.began = SegmentWriter(path, track.hello), now
        track.first_ns, track.named = start_ns, False
        return track.writer

    def _make_room(self, track: Track) -> None:
        """End the segments that a camera's other backlogs left open, the oldest first, but for a few."""
        late = [each for each in self.open if each.late and each.writer and each.hello.camera == track.hello.camera]
        for each in sorted(late, key=lambda each: each.began)[: max(0, len(late) - _MOST_LATE + 1)]:
            self._end(each)
            self.open.discard(each)

    def _failed(self, track: Track, problem: str) -> None:
        """A frame couldn't be written: its segment ends, old ones make room, and the camera starts with a key frame."""
        camera, now = track.hello.camera, time.monotonic()
        if camera not in self._broken:
            log.error("recording of camera %s: %s; live pictures go on", camera, problem)
        ask = now - self._broken.get(camera, -math.inf) > _ASK_AGAIN_S
        if ask:
            self._broken[camera] = now
        self._end(track)
        if not track.late:
            with self._lock:
                track.told.dropped += 1
                track.needs_key = True
        self.tidy(full=True)
        if ask:
            track.ask_key()

    def _flush(self, track: Track) -> str | None:
        """Bring what a track has onto the disk itself, and say that it is kept; returns why it couldn't be."""
        camera = track.hello.camera
        others = [other for other in self.open if other.hello.camera == camera] if track.repeats else []
        unkept, track.unkept, track.repeats = track.unkept, [], False
        track.flushed = time.monotonic()
        problem: str | None = None
        for each in {track, *others}:
            if each.writer is None:
                continue
            try:
                each.writer.flush()
                if not each.named:
                    self._store.secure(each.writer.path)
                    each.named = True
            except OSError as error:
                problem = error.strerror or str(error)
                log.error("recording %s: %s", each.writer.path, problem)
                # A second try that succeeds would prove nothing: the system tells of an error once, and drops the data.
                self._part_with(each, problem)
                each.ask_key()
        if unkept and problem is None:
            track.kept(unkept)
        return problem

    def _part_with(self, track: Track, problem: str) -> None:
        """What a track has written may not be on the disk: none of it counts as recorded.

        Any backlog of its camera that is under way may rest on it, as one that repeats what was live.
        """
        for each in {track, *self.open}:
            if each.late and each.hello.camera == track.hello.camera:
                each.problem = problem
        writer, span, track.writer, track.span, track.unkept = track.writer, track.span, None, None, []
        if span is not None:
            self._held.lose(track.hello.camera, track.hello.epoch, span)
        if writer is not None:
            _close(writer)

    def _finish(self, track: Track) -> str | None:
        """End a track's segment, if it has one, on the disk itself; returns why it couldn't be."""
        problem = self._flush(track)
        writer, span, track.writer, track.span = track.writer, track.span, None, None
        if span is not None:
            span.finish()
        if writer is not None:
            problem = _close(writer) or problem
        return problem


def _close(writer: SegmentWriter) -> str | None:
    """Close a segment, flushed or lost already; returns why it couldn't be, as on a file system of the network."""
    try:
        writer.close()
    except OSError as error:
        problem = error.strerror or str(error)
        log.error("recording %s: %s", writer.path, problem)
        return problem
    return None


def _levels_of(frame: pb.Frame, track: Track) -> NDArray[np.int8] | None:
    """Measurements of a frame; None of a difference to a frame other than the one that was passed over before."""
    before = None
    if frame.kind == pb.FRAME_KIND_DELTA:
        if track.passed is None or track.passed[0] != frame.base_sequence or track.passed[1] is None:
            return None
        before = track.passed[1]
    return next_levels(frame, track.hello, announcement(frame.payload).block, before)


def _as_key(frame: pb.Frame, levels: NDArray[np.int8]) -> pb.Frame:
    """The same measurements, as a frame that needs no other."""
    told = announcement(frame.payload)
    key = pb.Frame.FromString(frame.SerializeToString())
    key.kind, key.base_sequence = pb.FRAME_KIND_KEY, 0
    key.payload = Payload(told.operator_id, told.block, (Plane(levels.astype(np.int16)),)).pack()
    return key
