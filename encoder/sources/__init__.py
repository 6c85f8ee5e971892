"""Where frames come from: one file per kind of source, and the table that picks one.

A source is opened by its constructor, which raises ``SourceError`` when it can't be; ``frames`` then gives frames until
the source ends, and ``close`` may be called at any time, from any thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray


class SourceError(Exception):
    """A source that can't be opened or that broke; the message names it and says what to do."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a camera.

    Attributes:
        luma: uint8 (H, W), ITU-R 601, full range.
        capture_time_ns: when it was captured, nanoseconds since 1970.
        capture_ms: what reading and decoding it took, without waiting for its turn.
        colour: whether the source has colour, which isn't sent.
    """

    luma: NDArray[np.uint8]
    capture_time_ns: int
    capture_ms: float
    colour: bool


class Source(Protocol):
    """What every source does."""

    name: str
    """For people: what is being read, passwords masked."""
    frame_rate: float
    """Frames a second that it means to give; 0 if unknown."""

    def __init__(self, spec: str, paced: bool) -> None: ...

    def frames(self) -> Iterator[Frame]: ...

    def close(self) -> None: ...


SOURCES = {
    "device": "encoder.sources.device:DeviceSource",
    "folder": "encoder.sources.folder:FolderSource",
    "pattern": "encoder.sources.pattern:PatternSource",
    "rtsp": "encoder.sources.url:UrlSource",
    "rtsps": "encoder.sources.url:UrlSource",
    "http": "encoder.sources.url:UrlSource",
    "https": "encoder.sources.url:UrlSource",
    "file": "encoder.sources.file:FileSource",
}
"""Scheme → where its class stands. Imported when it is chosen."""


def scheme_of(spec: str) -> str:
    """The scheme of a source as a user writes it: a device number or node, a URL, a folder, a file, ``pattern``."""
    if (spec.isascii() and spec.isdigit()) or spec.startswith("/dev/"):
        return "device"
    if "://" in spec:
        return spec.split("://", 1)[0].lower()
    if spec == "pattern" or spec.startswith("pattern:"):
        return "pattern"
    return "folder" if Path(spec).is_dir() else "file"


def open_source(spec: str, paced: bool = True) -> Source:
    """Open a source.

    Args:
        spec: ``0``, ``/dev/video0``, ``rtsp://…``, ``http://…``, a folder of pictures, a video file, or ``pattern``,
            ``pattern:640x480@25``.
        paced: whether files, folders and the pattern keep real time; cameras always do.

    Raises:
        SourceError: unknown scheme, or the source can't be opened.
    """
    scheme = scheme_of(spec)
    if scheme not in SOURCES:
        raise SourceError(f"{masked(spec)}: unknown scheme {scheme}://, expected one of {', '.join(SOURCES)}")
    module, name = SOURCES[scheme].split(":")
    source: type[Source] = getattr(import_module(module), name)
    return source(spec, paced)


def masked(spec: str) -> str:
    """A source as it may be shown: a password in its URL becomes ``***``."""
    if "://" not in spec:
        return spec
    try:
        parts = urlsplit(spec)
    except ValueError:
        return spec.split("://", 1)[0] + "://***"
    if parts.password is None:
        return spec
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{host}"))
