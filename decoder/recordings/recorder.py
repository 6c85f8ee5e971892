"""The recorder: frames of all cameras, as they came, into segments. The live stream never waits for it.

camera's stream ─▶ offer (bounded) ─▶ writer thread ─▶ segment ─▶ flushed: kept, and told so
                     │ full: dropped, counted, and that camera is asked for a key frame to go on with
its backlog ─▶ offer_late (one at a time) ─▶ the same thread ─▶ segments of its own, that lie between the others in time

A frame that is recorded already is passed over. One that is a difference to such a frame is coded anew as a key frame.
What was recorded before this process began, other threads look at: one at a camera's newest segments, where a frame may
be that is sent again live, one at all of them, where late ones may be. Its frames wait for that, the live ones for some
seconds at most; the writer and all other cameras go on.

Capture times rise in a segment, but for little: where a camera's clock is set, another begins.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from decoder.admission import next_levels
from decoder.recordings.held import Held, Span, look
from decoder.recordings.store import GAP_NS, Store
from protos.payload import Payload, Plane, announcement
from protos.segment import SegmentWriter
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.decode")

_TIDY_EVERY_S = 10.0
_FLUSH_EVERY_S = 2.0
_LOOK_EVERY_S = 0.5
_LATE_IDLE_S = 30.0
"""A segment of a backlog ends when nothing came for so long."""
_UNSTEADY_NS = 10**9
"""Capture times may fall by so much without that the clock was set."""
_HOLE = 10
"""How many times its usual step a camera stands still, at least, for that to end a segment: few frames are no holes."""
_LOOKED_S = 2.0
"""Live frames wait so long for a look at their camera's newest segments, at most: then one may be recorded twice."""
_TELL_EVERY_S = 60.0
_FAULT = "the server failed, see its log"


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
    late: int = 0
    """Of the frames, those that came in a backlog."""
    repeated: int = 0
    """Received, live or in a backlog, when they were recorded already."""


def _nobody(*_: object) -> None:
    """Whom there is nothing to tell."""


@dataclass(eq=False)
class Track:
    """One stream of a camera, or its backlogs of one run, on the way to disk. Writer's own from ``writer`` on,
    but for ``offered_ns`` and ``usual_ns``.

    Attributes:
        kept: is told the sequences of frames that are flushed to disk.
        needs_key: only a key frame can be offered now.
        gap: frames of it were dropped since the last one that is on its way.
        offered_ns: when the frame offered last was captured.
        usual_ns: between two frames, of late.
        last: sequence of the frame written last, and when it was captured.
        first_ns: when the first frame of its segment was captured.
        named: the name of its segment is on the disk itself.
        passed: sequence of a frame that was passed over since, if one was, and its measurements if they are known.
        unkept: written, or found to be recorded, and not yet flushed.
    """

    hello: pb.Hello
    told: Recorded
    ask_key: Callable[[], object] = _nobody
    kept: Callable[[list[int]], object] = _nobody
    late: bool = False
    needs_key: bool = True
    gap: bool = False
    writer: SegmentWriter | None = None
    span: Span | None = None
    named: bool = False
    offered_ns: int | None = None
    usual_ns: int = 0
    last: tuple[int, int] = (0, 0)
    first_ns: int = 0
    passed: tuple[int, NDArray[np.int8] | None] | None = None
    unkept: list[int] = field(default_factory=list)
    repeats: bool = False
    began: float = 0.0
    flushed: float = 0.0


Done = Callable[[str | None], object]
"""Is told that it is done, or why it couldn't be; in the writer's thread."""


@dataclass(frozen=True, eq=False)
class _Offer:
    """What the writer is to do: write a frame, or end a stream, or bring a backlog onto the disk.

    Attributes:
        size: bytes that it takes while it waits.
        apart: frames are missing before this one that may come in a backlog: it begins a segment.
        levels: the frame's measurements, where it may have to be coded anew.
        hole: the camera gave nothing for long before this one: it begins a segment.
    """

    track: Track
    frame: pb.Frame | None = None
    received_ns: int = 0
    size: int = 0
    apart: bool = False
    levels: NDArray[np.int8] | None = None
    done: Done = _nobody
    hole: bool = False


@dataclass(frozen=True, eq=False)
class _Looked:
    """What was found of the recordings of a track's camera, or why they couldn't be looked at."""

    track: Track
    found: list[tuple[int, Span]]
    problem: str | None


class Recorder:
    """Records what it is offered until it is closed.

    Args:
        store: where to.
        limits: of a segment.
        waiting: bytes that may wait for the disk; beyond them frames are dropped.
    """

    def __init__(self, store: Store, limits: SegmentLimits = SegmentLimits(), waiting: int = 64 << 20) -> None:
        self._store, self._limits, self._most = store, limits, waiting
        self._held = Held()
        self._tracks: dict[str, Track] = {}
        self._late: dict[str, Track] = {}
        self._queue: queue.SimpleQueue[_Offer | _Looked | None] = queue.SimpleQueue()
        self._looks: dict[bool, queue.SimpleQueue[Track | None]] = {}
        self._parked: dict[Track, list[_Offer]] = {}
        self._waiting = 0
        self._lock = threading.Lock()
        self._open: set[Track] = set()
        self._broken = False
        self._told_fault = -_TELL_EVERY_S
        for late, name in ((False, "recordings-newest"), (True, "recordings-all")):
            asked = self._looks[late] = queue.SimpleQueue()
            threading.Thread(target=self._look_on, args=(asked,), name=name, daemon=True).start()
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    def begin(
        self, hello: pb.Hello, ask_key: Callable[[], object], kept: Callable[[list[int]], object] = _nobody
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

    def end(self, camera: str, done: Done = _nobody) -> None:
        """The camera's stream is over, and with it its segment."""
        if camera in self._tracks:
            self._queue.put(_Offer(self._tracks[camera], done=done))

    def forget(self, camera: str) -> None:
        """The server no longer knows the camera; what was recorded of it stays."""
        self.end(camera, lambda _: self._held.forget(camera))
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
        before_ns, track.offered_ns = track.offered_ns, frame.capture_time_ns
        step_ns = frame.capture_time_ns - before_ns if before_ns is not None else 0
        was_set = before_ns is not None and self._was_set(before_ns, frame.capture_time_ns)
        hole = step_ns > max(GAP_NS, _HOLE * track.usual_ns)
        if step_ns and not was_set:
            track.usual_ns = (7 * track.usual_ns + step_ns) // 8 if track.usual_ns else step_ns
        if frame.kind == pb.FRAME_KIND_KEY or not (was_set or hole):
            levels = None
        size = len(frame.payload) + (levels.nbytes if levels is not None else 0)
        with self._lock:
            if track.needs_key and frame.kind != pb.FRAME_KIND_KEY:
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
        self._queue.put(_Offer(track, frame, received_ns, size, apart, levels, hole=hole))
        return True

    def begin_late(self, hello: pb.Hello) -> Track:
        """A backlog of a camera that has begun; what it is to be offered with."""
        track = self._late.get(hello.camera)
        if track is None or track.hello != hello:
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
        self._queue.put(_Offer(track, frame, received_ns, levels=levels, done=done))

    def flush_late(self, track: Track, done: Done) -> None:
        """Bring what was offered of a backlog onto the disk itself."""
        self._queue.put(_Offer(track, done=done))

    def told(self) -> dict[str, Recorded]:
        """How each camera's recording fares."""
        return {camera: track.told for camera, track in self._tracks.items()}

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, and end."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _write_all(self) -> None:
        """What the writer's thread does. Nothing ends it but ``close``: it is the only one, of all cameras."""
        tidied = looked = 0.0
        going = True
        while going:
            try:
                going = self._take_next(_LOOK_EVERY_S if self._open or self._parked else None)
                now = time.monotonic()
                if now - tidied > _TIDY_EVERY_S:
                    tidied = now
                    self._tidy()
                if now - looked > _LOOK_EVERY_S:
                    looked = now
                    self._look(now)
            except Exception:  # noqa: BLE001 - whatever it is, what comes next may be recorded all the same
                self._fault("recordings: a fault; recording goes on")
        try:
            self._take_parked()
        except Exception:  # what is open is to be finished
            log.exception("recordings: what waited at the end isn't recorded")
        for track in self._open:
            self._end(track)
        for asked in self._looks.values():
            asked.put(None)

    def _take_next(self, timeout: float | None) -> bool:
        """Do what is next in the queue, if anything comes in time; False at the end of all."""
        try:
            offer = self._queue.get(timeout=timeout)
        except queue.Empty:
            return True
        if isinstance(offer, _Looked):
            self._unpark(offer)
        elif offer is not None:
            self._take(offer)
        return offer is not None

    def _take(self, offer: _Offer) -> None:
        """Do what is offered, or let it wait until it is known what is recorded already."""
        track = offer.track
        if track in self._parked:
            self._parked[track].append(offer)
        elif offer.frame is None or self._held.knows(track.hello.camera, track.hello.epoch, track.late):
            self._do(offer)
        else:
            self._parked[track], track.began = [offer], time.monotonic()
            self._looks[track.late].put(track)

    def _unpark(self, looked: _Looked) -> None:
        """It is known now what is recorded of a track's camera, or it can't be."""
        camera, late = looked.track.hello.camera, looked.track.late
        if looked.problem:
            log.error("recordings of camera %s can't be looked at: %s", camera, looked.problem)
        if looked.problem and late:
            for offer in self._parked.pop(looked.track, []):
                offer.done(looked.problem)
            return
        self._held.learn(camera, looked.found, late)
        known = [each for each in self._parked if each.hello.camera == camera and (late or not each.late)]
        for track in sorted(known, key=lambda each: each.late):  # a backlog's segments end where live ones begin
            for offer in self._parked.pop(track):
                self._do(offer)

    def _take_parked(self) -> None:
        """The last of what waits to be known is waited for, for a while; then what is live is recorded all the same."""
        until = time.monotonic() + _LOOKED_S
        while self._parked and (left := until - time.monotonic()) > 0:
            self._take_next(left)
        while self._parked:
            track, offers = self._parked.popitem()
            for offer in offers:
                if track.late:
                    offer.done("the server is shutting down")
                else:
                    self._do(offer)

    def _look_on(self, asked: "queue.SimpleQueue[Track | None]") -> None:
        """What a thread does that looks at segments."""
        while (track := asked.get()) is not None:
            found, problem = list[tuple[int, Span]](), None
            try:
                found = look(self._store, track.hello.camera, track.late)
            except OSError as error:
                problem = error.strerror or str(error)
            except Exception:  # frames wait for the answer, whatever it is
                log.exception("recordings of camera %s can't be looked at", track.hello.camera)
                problem = _FAULT
            self._queue.put(_Looked(track, found, problem))

    def _do(self, offer: _Offer) -> None:
        """Write a frame, end a stream or flush a backlog; whoever waits for it is told, however it goes."""
        track, problem = offer.track, None
        if offer.frame is not None and not track.late:
            with self._lock:
                self._waiting -= offer.size
        try:
            if offer.frame is not None:
                self._open.add(track)
                self._write(offer, offer.frame)
            elif track.late:
                problem = self._or_part(track, self._flush)
            else:
                problem = self._end(track)
                self._open.discard(track)
        except OSError as error:
            problem = error.strerror or str(error)
            self._failed(track, problem)
        except Exception:  # noqa: BLE001 - one frame's fault isn't to end what is recorded of all cameras
            problem = _FAULT
            self._fault("recording of camera %s: a frame can't be written", track.hello.camera)
            self._failed(track, problem)
        finally:
            offer.done(problem)

    def _end(self, track: Track) -> str | None:
        return self._or_part(track, self._finish)

    def _or_part(self, track: Track, work: Callable[[Track], str | None]) -> str | None:
        """Flush or finish a track's segment, or part with it if that has a fault: others are to go on."""
        try:
            return work(track)
        except Exception:  # noqa: BLE001 - see above
            self._fault("recording of camera %s: its segment can't be flushed", track.hello.camera)
            self._part_with(track)
            return _FAULT

    def _fault(self, *told: str) -> None:
        """Tell of a fault of this program's, with all there is to know of it, from time to time."""
        now = time.monotonic()
        if now - self._told_fault > _TELL_EVERY_S:
            self._told_fault = now
            log.exception(*told)

    def _look(self, now: float) -> None:
        """Flush what was written a while ago, end idle backlogs, and wait for no look for long."""
        for track in list(self._parked):
            if not track.late and now - track.began > _LOOKED_S:
                camera = track.hello.camera
                log.warning("recordings of camera %s: looking at them takes long; what is live isn't held up", camera)
                self._unpark(_Looked(track, [], None))
        for track in list(self._open):
            if track.late and now - track.began > _LATE_IDLE_S:
                self._end(track)
                self._open.discard(track)
            elif track.unkept and now - track.flushed > _FLUSH_EVERY_S:
                self._or_part(track, self._flush)

    def _write(self, offer: _Offer, frame: pb.Frame) -> None:
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
        self._end_before(track, frame, offer.apart and epoch > 0, offer.hole, now)
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
        begun = track.writer is None
        if track.writer is None:
            path = self._store.place(camera, frame.capture_time_ns)
            track.writer, track.began = SegmentWriter(path, track.hello), now
            track.first_ns, track.named = frame.capture_time_ns, False
        if track.late:
            track.began = now
        before = 0 if begun else track.writer.size
        track.writer.append(frame, offer.received_ns)
        if track.span is None:
            track.span = self._held.begin(camera, epoch, track.writer.path, frame.sequence)
        else:
            self._held.add(camera, epoch, track.span, frame.sequence)
        track.last = frame.sequence, frame.capture_time_ns
        track.unkept.append(frame.sequence)
        with self._lock:
            track.told.frames += 1
            track.told.late += track.late
            track.told.bytes += track.writer.size - before
        if self._broken:
            self._broken = False
            log.info("recording goes on")

    def _end_before(self, track: Track, frame: pb.Frame, apart: bool, hole: bool, now: float) -> None:
        """End a track's segment if this frame isn't to be in it."""
        if track.writer is None:
            return
        key = frame.kind == pb.FRAME_KIND_KEY
        before, captured_ns = track.last
        over = hole or track.passed is not None or self._was_set(captured_ns, frame.capture_time_ns)
        seconds = (frame.capture_time_ns - track.first_ns) / 1e9
        full = self._is_full(track.writer, seconds if track.late else max(seconds, now - track.began))
        if full and not key and not over:
            track.ask_key()
        over = over or (key and (full or apart))
        if track.late and not over:
            over = frame.sequence <= before
            over = over or self._held.begins_between(track.hello.camera, track.hello.epoch, before, frame.sequence)
        if over:
            self._finish(track)

    def _failed(self, track: Track, problem: str) -> None:
        """A frame couldn't be written: its segment ends, old ones make room, and the camera starts with a key frame."""
        if not self._broken:
            self._broken = True
            log.error("recording of camera %s: %s; live pictures go on", track.hello.camera, problem)
        self._end(track)
        if not track.late:
            with self._lock:
                track.told.dropped += 1
                track.needs_key = True
        self._tidy(full=True)
        track.ask_key()

    def _was_set(self, before_ns: int, captured_ns: int) -> bool:
        """Whether the camera's clock was set between two frames: a segment is short by that clock too, and rises."""
        return not -_UNSTEADY_NS <= captured_ns - before_ns <= self._limits.seconds * 1e9

    def _is_full(self, writer: SegmentWriter, seconds: float) -> bool:
        return seconds > self._limits.seconds or writer.size > self._limits.megabytes * (1 << 20)

    def _flush(self, track: Track) -> str | None:
        """Bring what a track has onto the disk itself, and say that it is kept; returns why it couldn't be."""
        camera = track.hello.camera
        others = [other for other in self._open if other.hello.camera == camera] if track.repeats else []
        unkept, track.unkept, track.repeats = track.unkept, [], False
        track.flushed = time.monotonic()
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
                self._part_with(each)
                each.ask_key()
                return problem
        if unkept:
            track.kept(unkept)
        return None

    def _part_with(self, track: Track) -> None:
        """What a track has written may not be on the disk: none of it counts as recorded."""
        writer, span, track.writer, track.span, track.unkept = track.writer, track.span, None, None, []
        if span is not None:
            self._held.lose(track.hello.camera, track.hello.epoch, span)
        if writer is not None:
            _close(writer)

    def _finish(self, track: Track) -> str | None:
        problem = self._flush(track)
        writer, span, track.writer, track.span = track.writer, track.span, None, None
        if span is not None:
            span.finish()
        if writer is not None:
            problem = _close(writer) or problem
        return problem

    def _tidy(self, full: bool = False) -> None:
        writing = {track.writer.path for track in self._open if track.writer is not None}
        try:
            for kept in self._store.tidy(writing, full):
                self._held.deleted(kept.camera, kept.path)
        except OSError as error:
            log.error("recordings in %s can't be tidied: %s", self._store.folder, error.strerror or error)


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
