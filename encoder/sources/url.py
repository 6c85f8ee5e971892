"""A network camera: RTSP (over TCP) or HTTP, read through OpenCV's FFmpeg."""

import contextlib
import os
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import cv2

from encoder.sources import Frame, SourceAwayError, SourceError, masked
from encoder.sources.capture import Capture, live_frames

_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
_OPEN_TIMEOUT_MS = 10_000
_READ_TIMEOUT_MS = 60_000
"""A camera that is watched is given up sooner, whatever it is that OpenCV waits for."""


class UrlSource:
    """Frames as they arrive, with as little buffering as FFmpeg allows."""

    live = True

    def __init__(self, spec: str, paced: bool) -> None:
        self.name = masked(spec)
        if not _host(spec):
            raise SourceError(f"{self.name}: no host in this URL")
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _READ_TIMEOUT_MS]
        problem = f"{self.name}: nothing there gives video (host up? address, path, user and password right?)"
        try:
            with _low_delay():
                self._capture = Capture(self.name, spec, cv2.CAP_FFMPEG, timeouts, problem)
        except SourceError as error:
            raise SourceAwayError(str(error)) from None
        self.frame_rate = self._capture.frame_rate

    def frames(self) -> Iterator[Frame]:
        last = time.monotonic()
        for frame in live_frames(self._capture):
            yield frame
            last = time.monotonic()
        if time.monotonic() - last < _READ_TIMEOUT_MS / 1000:
            raise SourceAwayError(f"{self.name}: the stream ended")
        raise SourceAwayError(f"{self.name}: the stream sent nothing for {_READ_TIMEOUT_MS / 1000:g} s")

    def close(self) -> None:
        self._capture.close()


@contextlib.contextmanager
def _low_delay() -> Iterator[None]:
    """FFmpeg's options, which OpenCV takes from nowhere else; a user's own win.

    They must not stay: with them, a file that is opened later loses its first frame.
    """
    if _OPTIONS in os.environ:
        yield
        return
    os.environ[_OPTIONS] = "rtsp_transport;tcp|fflags;nobuffer|flags;low_delay"
    try:
        yield
    finally:
        os.environ.pop(_OPTIONS, None)


def _host(spec: str) -> str | None:
    try:
        return urlsplit(spec).hostname
    except ValueError:
        return None
