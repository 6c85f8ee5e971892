"""Which frames of a camera's runs are recorded: known from the segments, so that a restart forgets nothing.

What this process writes, it knows at once. What was there before is looked at by ``look``, which may take minutes on a
disk that is slow, and then learnt: until it is, nobody can tell whether a frame is recorded.
"""

import logging
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from decoder.recordings.store import Store, sync
from protos.segment import Segment, SegmentError, last_entry

log = logging.getLogger("veilcam.decode")


_READ = 16
"""Segments whose sequences are remembered at one time."""
NEWEST = 8
"""Segments of a camera among which a frame lies that is sent again as live: it is what was received last of it."""


@dataclass(eq=False)
class Span:
    """A segment's sequences, from the first to the last of one run, gaps between them.

    Attributes:
        sequences: all of them, counting up; None if they are to be read from the segment.
    """

    path: Path
    first: int
    last: int
    sequences: "array[int] | None" = None

    def has(self, sequence: int) -> bool:
        """Whether the frame is recorded here."""
        if not self.first <= sequence <= self.last:
            return False
        if self.sequences is None:
            self.sequences = array("Q", (entry.sequence for entry in Segment(self.path).entries()))
        place = bisect_left(self.sequences, sequence)
        return place < len(self.sequences) and self.sequences[place] == sequence

    def add(self, sequence: int) -> None:
        """A frame was written, after all others."""
        assert self.sequences is not None
        self.sequences.append(sequence)
        self.last = sequence

    def finish(self) -> None:
        """It is written; its sequences can be read from it."""
        self.sequences = None


@dataclass
class _Run:
    """What is recorded of one run of a camera."""

    spans: list[Span] = field(default_factory=list)
    last: int = 0


class Held:
    """Which frames of each camera's runs are recorded. For one thread; it reads no more than a segment at a time."""

    def __init__(self) -> None:
        self._cameras: dict[str, defaultdict[int, _Run]] = {}
        self._read: list[Span] = []
        self._newest_known: set[str] = set()
        self._all_known: set[str] = set()
        self._lost: set[Path] = set()

    def knows(self, camera: str, epoch: int, late: bool) -> bool:
        """Whether ``has`` can tell of a frame that is live, or of one that is late, which may lie in any segment."""
        return not epoch or camera in self._all_known or (not late and camera in self._newest_known)

    def learn(self, camera: str, found: Iterable[tuple[int, Span]], late: bool) -> None:
        """What ``look`` has found: in all segments, if it is for what is late, or in the newest."""
        runs = self._runs(camera)
        known = {span.path for run in runs.values() for span in run.spans} | self._lost
        for epoch, span in found:
            if span.path not in known and span.path.exists():
                runs[epoch].spans.append(span)
                runs[epoch].last = max(runs[epoch].last, span.last)
        (self._all_known if late else self._newest_known).add(camera)

    def has(self, camera: str, epoch: int, sequence: int) -> bool:
        """Whether a frame is recorded, as far as is known; never known of a camera that doesn't count its runs."""
        if not epoch:
            return False
        run = self._runs(camera)[epoch]
        if sequence > run.last:
            return False
        return any(self._span_has(span, sequence) for span in reversed(run.spans))

    def begins_between(self, camera: str, epoch: int, after: int, before: int) -> bool:
        """Whether a segment of the run begins between two sequences."""
        return any(after < span.first < before for span in self._runs(camera)[epoch].spans)

    def begin(self, camera: str, epoch: int, path: Path, sequence: int) -> Span:
        """A new segment, and the first frame that was written to it."""
        self.deleted(camera, path)  # as by a person, if there was one of that name
        span = Span(path, sequence, sequence, array("Q", [sequence]))
        if epoch:
            run = self._runs(camera)[epoch]
            run.spans.append(span)
            run.last = max(run.last, sequence)
        return span

    def add(self, camera: str, epoch: int, span: Span, sequence: int) -> None:
        """One more frame was written to a segment."""
        span.add(sequence)
        if epoch:
            run = self._runs(camera)[epoch]
            run.last = max(run.last, sequence)

    def lose(self, camera: str, epoch: int, span: Span) -> None:
        """What a segment has may not be on the disk: its frames are to be recorded anew."""
        if epoch:
            run = self._runs(camera)[epoch]
            run.spans = [each for each in run.spans if each is not span]
            self._lost.add(span.path)

    def deleted(self, camera: str, path: Path) -> None:
        """A segment isn't there any more."""
        for run in self._cameras.get(camera, {}).values():
            run.spans = [each for each in run.spans if each.path != path]
        self._lost.discard(path)

    def forget(self, camera: str) -> None:
        """Its segments are to be looked at anew, when it is back."""
        self._cameras.pop(camera, None)
        self._newest_known.discard(camera)
        self._all_known.discard(camera)

    def _span_has(self, span: Span, sequence: int) -> bool:
        unread = span.sequences is None
        try:
            if not span.has(sequence):
                return False
        except (SegmentError, OSError):
            return False  # deleted meanwhile
        finally:
            if unread and span.sequences is not None:
                self._read.append(span)
                if len(self._read) > _READ:
                    self._read.pop(0).finish()
        return span.path.exists()

    def _runs(self, camera: str) -> defaultdict[int, _Run]:
        return self._cameras.setdefault(camera, defaultdict(_Run))


def look(store: Store, camera: str, late: bool) -> list[tuple[int, Span]]:
    """Look at a camera's segments: of each the head, the first and the last frame. In any thread.

    What is found of a process before is brought onto the disk itself: killed, it may have left it to the system. What
    this one writes is its writer's, who alone is to be told how that goes.

    Args:
        store: where they are.
        camera: whose.
        late: at all of them; else at the ``NEWEST``, by when they were received.

    Returns:
        The number of each one's run, and its sequences. What can't be read is told and left out.

    Raises:
        OSError: the folder can't be read, or not be brought onto the disk.
    """
    segments = store.segments(camera)
    if not late:
        segments = sorted(segments, key=lambda kept: kept.received_ns)[-NEWEST:]
    found = [each for kept in segments if (each := _looked(kept.path, kept.path in store.placed)) is not None]
    before = [span.path for _, span in found if span.path not in store.placed]
    if before:
        store.secure(before[0])
    return found


def _looked(path: Path, own: bool) -> tuple[int, Span] | None:
    try:
        segment = Segment(path)
        if not segment.hello.epoch:
            return None
        first = next(segment.frames(), None)
        last = last_entry(path)
        if not own:
            sync(path)
    except (SegmentError, OSError) as error:
        log.warning("recording %s: what it has isn't known: %s", path.name, error)
        return None
    if first is None or last is None:
        return None
    return segment.hello.epoch, Span(path, first[0].sequence, last.sequence)
