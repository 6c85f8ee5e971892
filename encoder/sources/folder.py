"""A folder of pictures, in order of their names, as a clip."""

import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from encoder.sources import Frame, SourceError
from encoder.sources.capture import gray, readable
from encoder.sources.pacing import due_times

_FRAME_RATE = 10.0
_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm", ".ppm"}


class FolderSource:
    """Each picture of a folder once; all must have the size of the first."""

    live = False

    def __init__(self, spec: str, paced: bool) -> None:
        self.name = spec
        self.frame_rate = _FRAME_RATE
        self._paced = paced
        try:
            self._files = sorted(path for path in Path(spec).iterdir() if path.suffix.lower() in _SUFFIXES)
        except OSError as error:
            raise SourceError(f"{spec}: can't be read ({error.strerror})") from None
        if not self._files:
            raise SourceError(f"{spec}: no pictures in this folder (looked for {', '.join(sorted(_SUFFIXES))})")

    def frames(self) -> Iterator[Frame]:
        for path, due in zip(self._files, due_times(self.frame_rate, self._paced), strict=False):
            start = time.perf_counter()
            readable(path, "picture")
            try:
                picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
            except cv2.error:
                picture = None
            if picture is None:
                raise SourceError(f"{path}: not a picture that can be read")
            luma, colour = gray(np.asarray(picture, np.uint8))
            yield Frame(luma, due, (time.perf_counter() - start) * 1e3, colour)

    def close(self) -> None:
        pass
