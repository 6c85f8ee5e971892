"""A V4L2 camera: ``0`` or ``/dev/video0``."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import cv2

from encoder.sources import Frame, SourceError
from encoder.sources.capture import Capture, live_frames


class DeviceSource:
    """Frames as the driver gives them, its newest buffer only."""

    live = True

    def __init__(self, spec: str, paced: bool) -> None:
        path = Path(f"/dev/video{spec}") if spec.isdigit() else Path(spec)
        self.name = str(path)
        _check_device(path)
        self._capture = Capture(
            self.name,
            str(path),
            cv2.CAP_V4L2,
            [cv2.CAP_PROP_BUFFERSIZE, 1],
            f"{path}: opens, but isn't a camera that gives frames, or another program is using it",
        )
        self.frame_rate = self._capture.frame_rate

    def frames(self) -> Iterator[Frame]:
        yield from live_frames(self._capture)
        raise SourceError(f"{self.name}: the camera stopped giving frames (unplugged?)")

    def close(self) -> None:
        self._capture.close()


def _check_device(path: Path) -> None:
    try:
        if not stat.S_ISCHR(path.stat().st_mode):
            raise SourceError(f"{path}: not a device")
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    except FileNotFoundError:
        there = ", ".join(sorted(str(p) for p in Path("/dev").glob("video*"))) or "none"
        raise SourceError(f"{path}: no such camera (there: {there})") from None
    except PermissionError:
        raise SourceError(f"{path}: no permission (add your user to the group 'video')") from None
    except OSError as error:
        busy = error.errno in (errno.EBUSY, errno.EAGAIN)
        raise SourceError(f"{path}: {'another program is using it' if busy else error.strerror}") from None
