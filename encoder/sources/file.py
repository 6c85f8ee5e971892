"""A video file, at real-time pace unless told otherwise."""

import time
from collections.abc import Iterator
from pathlib import Path

import cv2

from encoder.sources import Frame, SourceError
from encoder.sources.capture import Capture, readable
from encoder.sources.pacing import due_times

_RATE_IF_UNKNOWN = 25.0


class FileSource:
    """Every frame of a video file, in order, once."""

    live = False

    def __init__(self, spec: str, paced: bool) -> None:
        readable(Path(spec), "video file or folder")
        self.name = spec
        self._paced = paced
        self._capture = Capture(spec, spec, cv2.CAP_FFMPEG, [], f"{spec}: not a video file that FFmpeg can read")
        self.frame_rate = self._capture.frame_rate or _RATE_IF_UNKNOWN

    def frames(self) -> Iterator[Frame]:
        count = 0
        for due in due_times(self.frame_rate, self._paced):
            start = time.perf_counter()
            if not self._capture.grab():
                break
            read = self._capture.read()
            if read:
                yield Frame(read[0], due, (time.perf_counter() - start) * 1e3, read[1])
                count += 1
        if not count:
            raise SourceError(f"{self.name}: no frame in it can be decoded")

    def close(self) -> None:
        self._capture.close()
