"""Recordings as films for other programs: MP4 with H.264, each picture at its own time. Needs PyAV."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np

from decoder.private import open_new
from decoder.recordings.playback import RecordingError, Shot, utc

_TICKS = 1000
"""A second; picture times are kept to a millisecond."""
_LONGEST_GAP_NS = 24 * 86_400 * 10**9
"""Between two pictures; MP4 holds no longer one in its ticks."""
_QUALITY = "20"
"""x264's constant rate factor: what it takes away can't be seen."""


@dataclass(frozen=True)
class Film:
    """What was written.

    Attributes:
        path: where; as asked for if it is whole, else a part's (``free_part``).
        pictures: their number.
        next_ns: when the first picture was captured that isn't in it any more; None if it is whole.
    """

    path: Path
    pictures: int
    next_ns: int | None


def free_part(path: Path) -> Path:
    """What a film that was stopped is called: ``a.part1.mp4``, or the next number that no film has yet.

    Args:
        path: of the film, or of a part, from whose number on it is looked.
    """
    found = re.fullmatch(r"(.+)\.part(\d{1,9})", path.stem)
    stem, number = (found[1], int(found[2])) if found else (path.stem, 1)
    while (part := path.with_name(f"{stem}.part{number}{path.suffix}")).exists():
        number += 1
    return part


def write_film(
    shots: Iterable[Shot],
    path: Path,
    progress: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> Film:
    """Write pictures as a film. Nothing is left at ``path`` unless whole.

    Args:
        shots: pictures in order.
        path: of the film.
        progress: called after each picture.
        stop: asked before each picture but the first; after a yes, what is there is made a film of its own.

    Raises:
        RecordingError: there are no pictures, or they change their size, or nothing was captured for weeks.
        OSError: it can't be written.
    """
    pictures = iter(shots)
    first = next(pictures, None)
    if first is None:
        raise RecordingError("no pictures in that range of time")
    partial = path.with_name(path.name + ".partial")
    height, width = first.pixels.shape
    count, last, next_ns, before_ns, passed_ns = 0, -1, None, first.capture_time_ns, 0
    try:
        open_new(partial).close()  # av keeps what it finds, and whom it is for
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(_TICKS), options={"crf": _QUALITY})
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            stream.codec_context.time_base = Fraction(1, _TICKS)
            container.start_encoding()  # x264 looks some 50 pictures ahead; a place that can't be written shows now
            for shot in chain([first], pictures):
                if count and stop():
                    next_ns = shot.capture_time_ns
                    break
                if shot.pixels.shape != (height, width):
                    changed = f"{width}×{height} to {shot.pixels.shape[1]}×{shot.pixels.shape[0]}"
                    when = utc(shot.capture_time_ns)
                    problem = f"the camera's pictures change from {changed} at {when}"
                    raise RecordingError(f"{problem}; export a film --to {when}, and one --from then on")
                even = np.pad(shot.pixels, ((0, height % 2), (0, width % 2)), mode="edge")
                frame = av.VideoFrame.from_ndarray(even, format="gray").reformat(format="yuv420p")
                if shot.capture_time_ns - before_ns > _LONGEST_GAP_NS:
                    when = utc(shot.capture_time_ns)
                    gap = f"nothing was captured between {utc(before_ns)} and {when}"
                    raise RecordingError(f"{gap}; export a film --to {when}, and one --from then on")
                passed_ns += max(0, shot.capture_time_ns - before_ns)  # a clock that is set back takes no time
                before_ns = shot.capture_time_ns
                last = max(last + 1, passed_ns * _TICKS // 1_000_000_000)
                frame.pts, frame.time_base = last, Fraction(1, _TICKS)
                container.mux(stream.encode(frame))
                count += 1
                progress()
            container.mux(stream.encode())
    except av.FFmpegError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    written = path if next_ns is None else free_part(path)
    partial.replace(written)
    return Film(written, count, next_ns)
