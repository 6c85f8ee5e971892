"""Which frames of a camera's runs are recorded: known from the segments, so that a restart forgets nothing."""

import logging
from array import array
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from decoder.recordings.store import Store
from protos.segment import Segment, SegmentError, last_entry

log = logging.getLogger("veilcam.decode")


_READ = 16
"""Segments whose sequences are remembered at one time."""


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
    """Which frames of each camera's runs are recorded. For one thread.

    A camera's segments are looked at when it is first asked for: of each the head and the last frame, and all sequences
    of those only that may have the frame in question.

    Args:
        store: where the segments are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cameras: dict[str, defaultdict[int, _Run]] = {}
        self._read: list[Span] = []

    def has(self, camera: str, epoch: int, sequence: int) -> bool:
        """Whether a frame is recorded; never known of a camera that doesn't count its runs."""
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

    def deleted(self, camera: str, path: Path) -> None:
        """A segment isn't there any more."""
        for run in self._cameras.get(camera, {}).values():
            run.spans = [each for each in run.spans if each.path != path]

    def forget(self, camera: str) -> None:
        """Look at its segments anew, when it is next asked for."""
        self._cameras.pop(camera, None)

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
        runs = self._cameras.get(camera)
        if runs is None:
            runs = self._cameras[camera] = defaultdict(_Run)
            for kept in self._store.segments(camera):
                self._look(kept.path, runs)
        return runs

    def _look(self, path: Path, runs: defaultdict[int, _Run]) -> None:
        try:
            segment = Segment(path)
            if not segment.hello.epoch:
                return
            first = next(segment.frames(), None)
            last = last_entry(path)
        except (SegmentError, OSError) as error:
            log.warning("recording %s: what it has isn't known: %s", path.name, error)
            return
        if first is not None and last is not None:
            run = runs[segment.hello.epoch]
            run.spans.append(Span(path, first[0].sequence, last.sequence))
            run.last = max(run.last, last.sequence)
