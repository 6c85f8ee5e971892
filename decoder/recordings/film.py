"""Recordings as films for other programs: MP4 with H.264, each picture at its own time. Needs PyAV."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np

from decoder.recordings.playback import RecordingError, Shot

_TICKS = 1000
"""A second; picture times are kept to a millisecond."""
_QUALITY = "20"
"""x264's constant rate factor: what it takes away can't be seen."""


def write_film(shots: Iterable[Shot], path: Path, progress: Callable[[], None] = lambda: None) -> int:
    """Write pictures as a film; returns their number. Nothing is left at ``path`` unless whole.

    Raises:
        RecordingError: there are no pictures, or they change their size.
        OSError: it can't be written.
    """
    pictures = iter(shots)
    first = next(pictures, None)
    if first is None:
        raise RecordingError("no pictures in that range of time")
    partial = path.with_name(path.name + ".partial")
    height, width = first.pixels.shape
    count, last = 0, -1
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(_TICKS), options={"crf": _QUALITY})
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            stream.codec_context.time_base = Fraction(1, _TICKS)
            for shot in chain([first], pictures):
                if shot.pixels.shape != (height, width):
                    changed = f"{width}×{height} to {shot.pixels.shape[1]}×{shot.pixels.shape[0]}"
                    raise RecordingError(f"the camera's pictures change from {changed} on the way; export a part")
                even = np.pad(shot.pixels, ((0, height % 2), (0, width % 2)), mode="edge")
                frame = av.VideoFrame.from_ndarray(even, format="gray").reformat(format="yuv420p")
                last = max(last + 1, (shot.capture_time_ns - first.capture_time_ns) * _TICKS // 1_000_000_000)
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
    partial.replace(path)
    return count
