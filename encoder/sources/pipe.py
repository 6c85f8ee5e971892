"""A named pipe that another program writes video into, in a container such as MPEG-TS, Matroska or AVI."""

import os
from collections.abc import Iterator

import cv2

from encoder.sources import Frame, SourceAwayError, SourceError
from encoder.sources.capture import Capture, live_frames


class PipeSource:
    """Frames as they are written."""

    live = True

    def __init__(self, spec: str, paced: bool) -> None:
        self.name = spec
        if not os.access(spec, os.R_OK):  # not opened to see: closing it would end the writer
            raise SourceError(f"{spec}: no permission to read this named pipe")
        problem = f"{spec}: what is written into it isn't video in a container that FFmpeg reads"
        try:
            self._capture = Capture(spec, spec, cv2.CAP_FFMPEG, [], problem)
        except SourceError as error:
            raise SourceAwayError(str(error)) from None
        self.frame_rate = self._capture.frame_rate

    def frames(self) -> Iterator[Frame]:
        yield from live_frames(self._capture)
        raise SourceAwayError(f"{self.name}: who wrote into it has closed it")

    def close(self) -> None:
        self._capture.close()
