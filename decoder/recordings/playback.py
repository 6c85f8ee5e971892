"""Recordings back into pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from decoder.admission import Refusal, next_levels
from decoder.catalogue import Catalogue, fit_rows
from decoder.recordings.segment import SUFFIX, Segment, SegmentError


class RecordingError(ValueError):
    """A recording that can't be played; the message names it and says why."""


@dataclass(frozen=True, eq=False)
class Shot:
    """One picture of a recording: uint8 (H, W), and when it was captured, in ns since 1970."""

    capture_time_ns: int
    pixels: NDArray[np.uint8]


class Recording:
    """Segments of one camera, played in order of their times.

    Args:
        path: a segment, or a camera's folder of them.
        catalogue: reconstructors to play it with.
        rendition: which of them.

    Raises:
        RecordingError: nothing that can be played is there, or the catalogue has no reconstructor for it.
    """

    def __init__(self, path: Path, catalogue: Catalogue, rendition: str) -> None:
        paths = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not paths:
            raise RecordingError(f"{path}: no segments (*{SUFFIX}) there")
        try:
            self.segments = [Segment(each) for each in paths]
        except SegmentError as error:
            raise RecordingError(str(error)) from None
        for segment in self.segments:
            operator_id = segment.hello.operator_id
            if catalogue.choose(operator_id, rendition, 1) is None:
                raise RecordingError(f"{segment.path}: no {rendition} reconstructor for operator {operator_id} here")
        self._catalogue, self._rendition = catalogue, rendition

    def times(self, start_ns: int = 0, end_ns: int = 2**63 - 1) -> list[int]:
        """Capture times of the frames in a range of time, the end left out."""
        times = [entry.capture_time_ns for segment in self.segments for entry in segment.entries()]
        return [time_ns for time_ns in times if start_ns <= time_ns < end_ns]

    def shots(self, start_ns: int = 0, end_ns: int = 2**63 - 1) -> Iterator[Shot]:
        """Pictures in a range of time, the end left out. Frames without their base, after damage, are passed over."""
        for segment in self.segments:
            entries = segment.entries()
            keys = [entry for entry in entries if entry.key and entry.capture_time_ns <= start_ns]
            yield from self._of_segment(segment, keys[-1].offset if keys else None, start_ns, end_ns)

    def _of_segment(self, segment: Segment, offset: int | None, start_ns: int, end_ns: int) -> Iterator[Shot]:
        hello = segment.hello
        block = self._catalogue.block(hello.operator_id)
        levels, sequence = None, 0
        for frame, _ in segment.frames(offset):
            if frame.base_sequence and frame.base_sequence != sequence:
                continue
            if frame.capture_time_ns >= end_ns:
                return
            try:
                levels = next_levels(frame, hello, block, levels)
            except Refusal as refusal:
                raise RecordingError(f"{segment.path}: {refusal}") from None
            sequence = frame.sequence
            if frame.capture_time_ns >= start_ns:
                yield Shot(
                    frame.capture_time_ns, self._reconstructed(levels, hello.operator_id, hello.height, hello.width)
                )

    def _reconstructed(self, levels: NDArray[np.int8], operator_id: str, height: int, width: int) -> NDArray[np.uint8]:
        reconstructor = self._catalogue.choose(operator_id, self._rendition, len(levels))
        assert reconstructor is not None
        return reconstructor.engine.reconstruct(fit_rows(levels, reconstructor.engine.rows)[None])[0, :height, :width]
