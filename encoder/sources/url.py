"""A network camera: RTSP (over TCP) or HTTP, read through OpenCV's FFmpeg."""

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

import cv2

from encoder.sources import Frame, SourceError, masked
from encoder.sources.capture import Capture, live_frames

_OPEN_TIMEOUT_MS = 10_000
_READ_TIMEOUT_MS = 10_000


class UrlSource:
    """Frames as they arrive, with as little buffering as FFmpeg allows."""

    live = True

    def __init__(self, spec: str, paced: bool) -> None:
        self.name = masked(spec)
        if not _host(spec):
            raise SourceError(f"{self.name}: no host in this URL")
        # OpenCV takes FFmpeg's options from nowhere else; a user's own win.
        os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp|fflags;nobuffer|flags;low_delay")
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _READ_TIMEOUT_MS]
        problem = f"{self.name}: nothing there gives video (host up? address, path, user and password right?)"
        self._capture = Capture(self.name, spec, cv2.CAP_FFMPEG, timeouts, problem)
        self.frame_rate = self._capture.frame_rate

    def frames(self) -> Iterator[Frame]:
        yield from live_frames(self._capture)
        raise SourceError(f"{self.name}: the stream ended or sent nothing for {_READ_TIMEOUT_MS // 1000} s")

    def close(self) -> None:
        self._capture.close()


def _host(spec: str) -> str | None:
    try:
        return urlsplit(spec).hostname
    except ValueError:
        return None
