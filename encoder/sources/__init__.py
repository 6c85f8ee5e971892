"""Where frames come from: one file per kind of source, and the table that picks one.

A source is opened by its constructor, which raises ``SourceError`` when it can't be; ``frames`` then gives frames until
the source ends, and ``close`` is called once nobody takes any more. One that is ``live`` runs in a process of its own,
which ``watched.py`` ends and begins again when it gives nothing.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SourceError(Exception):
    """A source that can't be opened or that broke; the message names it and says what to do."""


class SourceAwayError(SourceError):
    """A source that isn't there now and may come by itself, as a network camera that is still starting."""


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

    live: bool
    """Whether its frames come at a pace of their own, as a camera's do."""
    name: str
    """For people: what is being read, passwords masked."""
    frame_rate: float
    """Frames a second that it means to give; 0 if unknown."""

    def __init__(self, spec: str, paced: bool) -> None: ...

    def frames(self) -> Iterator[Frame]: ...

    def close(self) -> None: ...


SOURCES = {
    "device": "encoder.sources.device:DeviceSource",
    "pipe": "encoder.sources.pipe:PipeSource",
    "folder": "encoder.sources.folder:FolderSource",
    "pattern": "encoder.sources.pattern:PatternSource",
    "rtsp": "encoder.sources.url:UrlSource",
    "rtsps": "encoder.sources.url:UrlSource",
    "http": "encoder.sources.url:UrlSource",
    "https": "encoder.sources.url:UrlSource",
    "file": "encoder.sources.file:FileSource",
}
"""Scheme → where its class stands. Imported when it is chosen."""


_OWN = re.compile(r"/+(dev/(stdin$|fd/)|proc/(self|thread-self)/(task/\d+/)?fd/)")


def scheme_of(spec: str) -> str:
    """The scheme of a source as a user writes it: a device number or node, a URL, a folder, a file, ``pattern``.

    Raises:
        SourceError: a path that can't be looked at, or one that another process can't open.
    """
    if spec.isascii() and spec.isdigit():
        return "device"
    if "://" in spec:
        return spec.split("://", 1)[0].lower()
    if re.match(r"pattern([:#]|$)", spec):
        return "pattern"
    if _OWN.match(os.path.normpath(spec)):
        problem = "only this process could open it, and another reads the source"
        raise SourceError(f"{spec}: {problem}; give a named pipe: mkfifo camera, and write into that")
    try:
        path = Path(spec)
        if spec.startswith("/dev/video") or path.is_char_device():
            return "device"
        if path.is_fifo():
            return "pipe"
        return "folder" if path.is_dir() else "file"
    except (OSError, ValueError) as error:
        raise SourceError(f"{spec[:200]}: can't be read ({error})") from None


def open_source(spec: str, paced: bool = True) -> Source:
    """Open a source.

    Args:
        spec: ``0``, ``/dev/video0``, ``rtsp://…``, ``http://…``, a folder of pictures, a video file, or ``pattern``,
            ``pattern:640x480@25``.
        paced: whether files, folders and the pattern keep real time; cameras always do.

    Raises:
        SourceError: unknown scheme, or the source can't be opened.
    """
    return source_class(spec)(spec, paced)


def source_class(spec: str) -> type[Source]:
    """The class of a source.

    Raises:
        SourceError: unknown scheme.
    """
    scheme = scheme_of(spec)
    if scheme not in SOURCES:
        raise SourceError(f"{masked(spec)}: unknown scheme {scheme}://, expected one of {', '.join(SOURCES)}")
    module, name = SOURCES[scheme].split(":")
    source: type[Source] = getattr(import_module(module), name)
    return source


def masked(spec: str) -> str:
    """A source as it may be shown: a password in its URL, and every value of its query, becomes ``***``.

    A password may hold any character, so all between the user's name and the last ``@`` is taken for one.
    """
    scheme, found, rest = spec.partition("://")
    if not found:
        return spec
    head, query, values = rest.partition("?")
    if "@" in values:
        head, query, values = rest, "", ""
    user, at, host = head.rpartition("@")
    if at and ":" in user:
        head = f"{user.split(':', 1)[0]}:***@{host}"
    return f"{scheme}://{head}{query}{re.sub(r'=[^&]*', '=***', values)}"
