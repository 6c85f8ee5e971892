"""Recordings back into pictures: a range of time in order, or any moment.

Where a camera's clock was set back, its segments overlap. Films and replays have all of their pictures, one segment
after the other by when they begin; a moment is shown as the segment has it that began last of those that reach it. So
no time tells how far a film has come: a place does.
"""

import contextlib
import logging
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import accumulate, chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from decoder.admission import Refusal, next_levels
from decoder.catalogue import Catalogue, fit_rows
from decoder.recordings.store import GAP_NS, Kept, Store
from protos.segment import SUFFIX, Entry, Segment, SegmentError, key_of, last_entry, with_base
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.decode")

_T = TypeVar("_T")

_POSITIONS = 16
"""Places in recordings that are remembered, each with the measurements of one frame."""
_REACH_NS = 3600 * 10**9
"""A segment that began longer ago is over: the recorder ends it after 10 minutes, by the camera's clock too."""


def utc(time_ns: int) -> str:
    """A time as ``--from`` and ``--to`` take it, less than a microsecond before."""
    return (datetime(1970, 1, 1) + timedelta(microseconds=time_ns // 1000)).isoformat()


class RecordingError(ValueError):
    """A recording that can't be played; the message names it and says why."""


class NoReconstructorError(RecordingError):
    """A recording of an operator for which there is no reconstructor here."""


@dataclass(frozen=True, order=True)
class Place:
    """Where a picture of a recording is, in the order of films.

    Attributes:
        segment: the name of its file, without a suffix.
        sequence: of its frame.
    """

    segment: str = ""
    sequence: int = 0

    def __str__(self) -> str:
        return f"{self.segment}:{self.sequence}"

    @classmethod
    def read(cls, told: str) -> "Place":
        """The place that is told so.

        Raises:
            ValueError: it is none.
        """
        segment, _, sequence = told.rpartition(":")
        if not segment or not re.fullmatch(r"[0-9]{1,20}", sequence):
            raise ValueError(f"{told!r}, expected SEGMENT:SEQUENCE, as an export that was stopped told it")
        return cls(segment, int(sequence))


@dataclass(frozen=True, eq=False)
class Shot:
    """One picture of a recording: uint8 (H, W), when it was captured, in ns since 1970, and where it is."""

    capture_time_ns: int
    pixels: NDArray[np.uint8]
    place: Place = Place()


def segments_of(path: Path) -> list[Segment]:
    """A segment, or those that can be read of a camera's folder, in order of their times.

    Raises:
        RecordingError: there is none.
    """
    paths = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not paths:
        raise RecordingError(f"{path}: no segments (*{SUFFIX}) there")
    segments: list[Segment] = []
    for each in paths:
        try:
            segments.append(Segment(each))
        except SegmentError as error:
            if each is path:
                raise RecordingError(str(error)) from None
            log.warning("left out: %s", error)  # as of a service that was killed when it had just begun it
    if not segments:
        raise RecordingError(f"{path}: none of its segments can be read")
    return segments


def find(
    path: Path, start_ns: int = 0, end_ns: int = 2**63 - 1, begin: Place = Place()
) -> tuple[list[Segment], list[int]]:
    """Frames of a recording in a range of time, the end left out, from a place on.

    Returns:
        The segments that have any, and when each of the frames was captured.

    Raises:
        RecordingError: there are none, or the recording can't be read.
    """
    segments, found, others = list[Segment](), list[int](), list[int]()
    try:
        for segment in segments_of(path):
            entries = [entry for entry in entries_of(segment) if Place(segment.path.stem, entry.sequence) >= begin]
            times = [entry.capture_time_ns for entry in entries]
            asked = [time_ns for time_ns in times if start_ns <= time_ns < end_ns]
            if asked:
                segments.append(segment)
                found += asked
            elif times:
                others += [min(times), max(times)]
    except OSError as error:
        raise RecordingError(f"{error.filename or path}: {error.strerror}") from None
    if not found:
        there = f"; there are some from {utc(min(others))} to {utc(max(others))}" if others else ""
        raise RecordingError(f"{path}: no pictures in that range of time{there}")
    return segments, found


def entries_of(segment: Segment) -> list[Entry]:
    """A segment's frames, none of one that retention deleted since it was found, which is told.

    Raises:
        OSError: it is there and can't be read.
    """
    try:
        return segment.entries()
    except FileNotFoundError:
        log.warning("%s was deleted meanwhile; it is left out", segment.path)
        return []


class Recording:
    """Segments of one camera, played in order of their times.

    Args:
        segments: in that order.
        catalogue: reconstructors to play them with.
        renditions: the first that the catalogue has a reconstructor for is played.

    Raises:
        RecordingError: the catalogue has no reconstructor for one of them.
    """

    def __init__(self, segments: Sequence[Segment], catalogue: Catalogue, *renditions: str) -> None:
        self.segments = segments
        for segment in segments:
            operator_id = segment.hello.operator_id
            if not any(catalogue.choose(operator_id, rendition, 1) for rendition in renditions):
                told = " or ".join(renditions)
                raise NoReconstructorError(f"{segment.path}: no {told} reconstructor for operator {operator_id} here")
            try:
                catalogue.check_sides(segment.hello)
            except Refusal as refusal:
                raise RecordingError(f"{segment.path}: {refusal}") from None
        self._catalogue, self._renditions = catalogue, renditions

    def shots(self, start_ns: int = 0, end_ns: int = 2**63 - 1, begin: Place = Place()) -> Iterator[Shot]:
        """Pictures in a range of time, the end left out, from a place on.

        Frames without their base, after damage, are passed over.
        """
        for segment in self.segments:
            entries = entries_of(segment)
            asked = {
                entry.sequence
                for entry in entries
                if start_ns <= entry.capture_time_ns < end_ns and Place(segment.path.stem, entry.sequence) >= begin
            }
            if asked:
                yield from self._of_segment(segment, key_of(entries, min(asked)), asked)

    def _of_segment(self, segment: Segment, offset: int | None, sequences: set[int]) -> Iterator[Shot]:
        hello, last = segment.hello, max(sequences)
        for frame, levels in _decoded(segment, self._catalogue.block(hello.operator_id), offset):
            if frame.sequence in sequences:
                pixels = self._reconstructed(levels, hello.operator_id, hello.height, hello.width)
                yield Shot(frame.capture_time_ns, pixels, Place(segment.path.stem, frame.sequence))
            if frame.sequence >= last:
                return

    def _reconstructed(self, levels: NDArray[np.int8], operator_id: str, height: int, width: int) -> NDArray[np.uint8]:
        found = (self._catalogue.choose(operator_id, rendition, len(levels)) for rendition in self._renditions)
        reconstructor = next(each for each in found if each is not None)
        return reconstructor.engine.reconstruct(fit_rows(levels, reconstructor.engine.rows)[None])[0, :height, :width]


@dataclass(frozen=True, eq=False)
class Moment:
    """What a camera saw: quantised measurements (rows, H/B, W/B) int8, who it was, when, and when it saw the next."""

    hello: pb.Hello
    levels: NDArray[np.int8]
    capture_time_ns: int
    next_ns: int | None


class Playback:
    """Any moment of what a store holds. It remembers where it was: the frame after it costs no more than that frame.

    It also remembers where a segment's frames are, until the segment changes.

    Every call may be slow and is safe in any thread.
    """

    def __init__(self, store: Store, catalogue: Catalogue) -> None:
        self._store, self._catalogue = store, catalogue
        self._lock = threading.Lock()
        self._positions: OrderedDict[Path, tuple[int, pb.Frame, NDArray[np.int8]]] = OrderedDict()
        self._entries: OrderedDict[Path, tuple[tuple[int, int], list[Entry]]] = OrderedDict()

    def spans(self, camera: str) -> list[tuple[int, int]]:
        """When a camera was recorded: first and last capture time of each stretch without a long gap."""
        spans: list[tuple[int, int]] = []
        for kept in self._store.segments(camera):
            end_ns = max(kept.start_ns, _last_time(kept.path))
            if spans and kept.start_ns - spans[-1][1] < GAP_NS:
                spans[-1] = (spans[-1][0], max(end_ns, spans[-1][1]))
            else:
                spans.append((kept.start_ns, end_ns))
        return spans

    def at(self, camera: str, time_ns: int) -> Moment | None:
        """What a camera saw at a time: its last frame until then, or its first. None where nothing is recorded.

        Raises:
            NoReconstructorError: a recording of an operator that the catalogue doesn't have.
            RecordingError: one that can't be read.
        """
        kept = self._store.segments(camera)
        if not kept:
            return None
        begun = max(1, bisect_right([each.start_ns for each in kept], time_ns))
        newest, *others = reversed(kept[:begun])
        others = [each for each in others if each.start_ns >= time_ns - _REACH_NS]
        after = [each.start_ns for each in kept[begun : begun + 1]]
        with self._lock:
            try:
                return self._of_segments(Segment(newest.path), others, time_ns, after)
            except (SegmentError, OSError) as error:
                raise RecordingError(str(error)) from None

    def _of_segments(self, newest: Segment, others: list[Kept], time_ns: int, after: list[int]) -> Moment | None:
        """What was seen at a time by segments that have begun.

        Args:
            newest: that began last.
            others: before it, the newest first; opened only where it takes them to tell.
            after: when the next segment begins, if there is one.
        """
        shown = self._shown(chain([newest], _readable(others)), time_ns)
        moment = self._moment(shown, time_ns)
        if moment is None:
            return None
        if moment.next_ns is not None:
            after = [*after, moment.next_ns]
        elif _last_time(shown.path) >= time_ns:  # else none of the others goes on until then either
            until_ns = max(time_ns, moment.capture_time_ns)
            unshown = (each for each in chain([newest], _readable(others)) if each.path != shown.path)
            for entries in map(self._entries_of, unshown):
                after = [*after, *(entry.capture_time_ns for entry in entries if entry.capture_time_ns > until_ns)]
        return replace(moment, next_ns=min(after, default=None))

    def _shown(self, segments: Iterable[Segment], time_ns: int) -> Segment:
        """The first that goes on until a time, or the one that went on for longest."""
        ends = list[tuple[int, Segment]]()
        for segment in segments:
            ends.append((_last_time(segment.path), segment))
            if ends[-1][0] >= time_ns:
                break
        return max(ends, key=lambda each: each[0])[1]

    def _moment(self, segment: Segment, time_ns: int) -> Moment | None:
        operator_id = segment.hello.operator_id
        try:
            block = self._catalogue.block(operator_id)
        except KeyError:
            raise NoReconstructorError(f"{segment.path}: no reconstructor for operator {operator_id} here") from None
        entries = self._entries_of(segment)
        if not entries:
            return None
        times = list(accumulate((entry.capture_time_ns for entry in entries), max))  # they may fall a little
        place = max(0, bisect_right(times, time_ns) - 1)
        keys = [i for i in range(place, -1, -1) if entries[i].key or i == 0]
        known = self._positions.pop(segment.path, None)
        if known is not None and not keys[0] <= known[0] <= place:
            known = None
        reached, asked = known[1:] if known is not None else None, entries[place].sequence
        if known is None or known[0] < place:
            # From the key frame before it; from the one before that where it is damaged, and so is all that follows.
            for first in keys if known is None else (known[0] + 1,):
                before = reached or (None, None)
                for each in _decoded(segment, block, entries[first].offset, *before):
                    if each[0].sequence > asked:
                        break
                    reached = each
                    if each[0].sequence == asked:
                        break
                if reached is not None:
                    break
        if reached is None:  # nothing is left up to then: what comes first
            reached = next(_decoded(segment, block, entries[0].offset), None)
        if reached is None:
            return None
        frame, levels = reached
        _remember(self._positions, segment.path, (place, frame, levels))
        later = times[place + 1] if place + 1 < len(times) else None
        return Moment(segment.hello, levels, frame.capture_time_ns, later)

    def _entries_of(self, segment: Segment) -> list[Entry]:
        told = segment.path.stat()
        stamp, (known, entries) = (told.st_size, told.st_mtime_ns), self._entries.pop(segment.path, (None, []))
        if known != stamp:
            entries = segment.entries()
        _remember(self._entries, segment.path, (stamp, entries))
        return entries


def _readable(kept: Iterable[Kept]) -> Iterator[Segment]:
    for each in kept:
        with contextlib.suppress(SegmentError):  # what began later is shown without it
            yield Segment(each.path)


def _last_time(path: Path) -> int:
    try:
        last = last_entry(path)
    except (SegmentError, OSError):
        return 0  # deleted meanwhile, or nothing that can be shown
    return last.capture_time_ns if last is not None else 0


def _remember(places: OrderedDict[Path, _T], path: Path, what: _T) -> None:
    places[path] = what
    while len(places) > _POSITIONS:
        places.popitem(last=False)


def _decoded(
    segment: Segment,
    block: int,
    offset: int | None,
    frame: pb.Frame | None = None,
    levels: NDArray[np.int8] | None = None,
) -> Iterator[tuple[pb.Frame, NDArray[np.int8]]]:
    """Frames of a segment from an offset on, with their measurements.

    Frames without their base, after damage, are passed over.

    Args:
        frame, levels: the frame before the offset, if it isn't a key frame that stands there.

    Raises:
        RecordingError: a frame that isn't what its hello announced.
    """
    for each in with_base(segment.frames(offset), frame.sequence if frame is not None else 0):
        try:
            levels = next_levels(each, segment.hello, block, levels)
        except Refusal as refusal:
            raise RecordingError(f"{segment.path}: {refusal}") from None
        yield each, levels
