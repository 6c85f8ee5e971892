"""What sources that read through OpenCV share: opening, reading, gray."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from encoder.sources import Frame, SourceError

_DAMAGED_IN_A_ROW = 50

# FFmpeg and OpenCV would write lines of their own beside ours.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class Capture:
    """An open ``cv2.VideoCapture`` that gives luma."""

    def __init__(self, name: str, target: str, api: int, parameters: list[int], problem: str) -> None:
        self._name = name
        self._damaged = 0
        self._capture = cv2.VideoCapture(target, api, parameters)
        self._colour = False
        if not self._capture.isOpened():
            raise SourceError(problem)

    @property
    def frame_rate(self) -> float:
        """What the container or driver says; 0 if it says nothing believable."""
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        return rate if 0 < rate <= 1000 else 0.0

    def grab(self) -> bool:
        """Take the next frame from the driver or demultiplexer; the moment it returns is the moment of capture."""
        return bool(self._capture.grab())

    def read(self) -> tuple[NDArray[np.uint8], bool, float] | None:
        """Decode the frame that was grabbed: luma, whether it has colour, and milliseconds; None if it is damaged.

        Raises:
            SourceError: so many damaged ones in a row that no sound one can be hoped for.
        """
        start = time.perf_counter()
        try:
            sound, picture = self._capture.retrieve()
        except cv2.error:
            sound, picture = False, None
        if not sound or picture is None:
            self._damaged += 1
            if self._damaged > _DAMAGED_IN_A_ROW:
                raise SourceError(f"{self._name}: {self._damaged} frames in a row can't be decoded")
            return None
        self._damaged = 0
        luma, self._colour = gray(np.asarray(picture, np.uint8), self._colour)
        return luma, self._colour, (time.perf_counter() - start) * 1e3

    def close(self) -> None:
        self._capture.release()


def gray(picture: NDArray[np.uint8], known_colour: bool = False) -> tuple[NDArray[np.uint8], bool]:
    """Luma (H, W) of a picture as OpenCV gives it, and whether it has colour (its channels differ somewhere)."""
    if picture.ndim == 2:
        return picture, False
    colour = known_colour or bool((picture[..., :1] != picture[..., 1:3]).any())
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), np.uint8), colour


def readable(path: Path, what: str) -> None:
    """Refuse a path that isn't there or may not be read, before a decoder gives a vaguer answer."""
    try:
        with path.open("rb"):
            return
    except FileNotFoundError:
        raise SourceError(f"{path}: no such {what}") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: can't be read ({error})") from None


def live_frames(capture: Capture) -> Iterator[Frame]:
    """A camera's frames until it gives no more; damaged ones are passed over."""
    while capture.grab():
        captured = time.time_ns()
        read = capture.read()
        if read:
            yield Frame(read[0], captured, read[2], read[1])
