"""What sources that read through OpenCV share: opening, reading, gray."""

import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from encoder.sources import Frame, SourceError

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class Capture:
    """An open ``cv2.VideoCapture`` that gives luma."""

    def __init__(self, target: str | int, api: int, parameters: list[int], problem: str) -> None:
        self._capture = cv2.VideoCapture(target, api, parameters)
        self._colour = False
        if not self._capture.isOpened():
            raise SourceError(problem)

    @property
    def frame_rate(self) -> float:
        """What the container or driver says; 0 if it says nothing believable."""
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        return rate if 0 < rate <= 1000 else 0.0

    @property
    def frame_count(self) -> int:
        """What the container says; 0 if it says nothing."""
        return max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def grab(self) -> bool:
        """Take the next frame from the driver or demultiplexer; the moment it returns is the moment of capture."""
        return bool(self._capture.grab())

    def read(self) -> tuple[NDArray[np.uint8], bool, float] | None:
        """Decode the frame that was grabbed: luma, whether it has colour, and milliseconds."""
        start = time.perf_counter()
        sound, picture = self._capture.retrieve()
        if not sound:
            return None
        luma, colour = gray(np.asarray(picture, np.uint8), self._colour)
        self._colour = colour
        return luma, colour, (time.perf_counter() - start) * 1e3

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
    except OSError as error:
        raise SourceError(f"{path}: can't be read ({error.strerror})") from None


def live_frame(capture: Capture) -> Frame | None:
    """The next frame of a camera, or None when it gives no more."""
    if not capture.grab():
        return None
    captured = time.time_ns()
    read = capture.read()
    return Frame(read[0], captured, read[2], read[1]) if read else None
