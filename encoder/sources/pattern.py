"""A drawn test pattern: a frequency sweep, a grey ramp, a turning star and a bar that moves, and a frame counter."""

import re
import time
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from encoder.sources import Frame, SourceError
from encoder.sources.pacing import due_times

_SPEC = re.compile(r"pattern(?::(\d{1,5})x(\d{1,5})(?:@(\d{1,3}(?:\.\d+)?))?)?(?:#(\d{1,9}))?")
_SMALLEST, _LARGEST = 16, 16384


class PatternSource:
    """``pattern[:WIDTHxHEIGHT[@RATE]][#FRAMES]``, 640×480 at 25 frames a second and without end if not said."""

    live = False

    def __init__(self, spec: str, paced: bool) -> None:
        match = _SPEC.fullmatch(spec)
        if not match:
            raise SourceError(f"{spec}: expected pattern[:WIDTHxHEIGHT[@RATE]][#FRAMES], as in pattern:640x480@25")
        width, height = (
            int(side) if side else fallback for side, fallback in zip(match.groups(), (640, 480), strict=False)
        )
        self.frame_rate = float(match[3] or 25)
        self._count = int(match[4]) if match[4] else None
        if not (_SMALLEST <= width <= _LARGEST and _SMALLEST <= height <= _LARGEST and self.frame_rate > 0):
            raise SourceError(f"{spec}: sides of {_SMALLEST} to {_LARGEST} pixels and a rate above 0, please")
        self.name = f"pattern {width}×{height}"
        self._paced = paced
        self._still = _still(width, height)

    def frames(self) -> Iterator[Frame]:
        for index, due in enumerate(due_times(self.frame_rate, self._paced)):
            if index == self._count:
                return
            start = time.perf_counter()
            luma = self._drawn(index)
            yield Frame(luma, due, (time.perf_counter() - start) * 1e3, False)

    def close(self) -> None:
        pass

    def _drawn(self, index: int) -> NDArray[np.uint8]:
        picture = self._still.copy()
        height, width = picture.shape
        centre, radius = (width // 2, height // 2), min(height, width) // 4
        for spoke in range(12):
            cv2.ellipse(picture, centre, (radius, radius), index * 2 + spoke * 30, 0, 15, 230, -1)
        bar = index * max(1, width // 100) % width
        cv2.rectangle(picture, (bar, height * 3 // 4), (bar + width // 40, height - 1), 250, -1)
        scale = height / 400
        cv2.putText(
            picture, f"{index:06d}", (width // 50, height // 8), 0, scale, 20, max(1, round(2 * scale)), cv2.LINE_AA
        )
        return picture


def _still(width: int, height: int) -> NDArray[np.uint8]:
    x = np.linspace(0, 1, width, dtype=np.float32)
    picture = np.full((height, width), 150, np.float32)
    sweep = 128 + 90 * np.sin(2 * np.pi * x**2 * width / 8)
    picture[height // 4 : height * 3 // 4] = sweep
    picture[height * 3 // 4 :] = 255 * x
    return np.asarray(picture, np.uint8)
