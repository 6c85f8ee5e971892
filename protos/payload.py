"""The payload: how the measurements of one frame are laid out in bytes, both directions.

All numbers little-endian. A change of any byte is a new version, and golden files in ``tests/protos`` pin each.

    header   magic "VCP" │ u8 version │ 8 bytes operator id │ u8 block side │ u8 planes (1–4)
    plane    u8 kind │ u8 entropy coder │ u8 quantiser │ u16 rows │ u16 grid height │ u16 grid width │ u32 length
    body     each plane's coded values, rows × grid height × grid width, index-major (all blocks of row 0, then 1, …)
    end      u32 CRC-32 of everything before

Rows are a prefix of Φ's, so a camera may change its ratio between two frames. The quantiser is a whole number k of
steps: values were divided by k·step before rounding, and are multiplied by k again here. Planes have grids of their
own, so that smaller chroma needs no new version.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from protos import cascade

VERSION = 1
MAX_PLANES = 4
MAX_MEASUREMENTS = 1 << 24
"""Values in one payload, by default: 1/4 of the pixels of an 8K frame in three planes, 32 MiB once unpacked."""

_MAGIC = b"VCP"
_HEADER = struct.Struct("<3sB8sBB")
_PLANE = struct.Struct("<BBBHHHI")
_CRC = struct.Struct("<I")
_CASCADE = 1
_ID_BYTES = 8


class PlaneKind(IntEnum):
    """What a plane holds; the numbers of veilcam.v1.PlaneKind."""

    LUMA = 1
    CB = 2
    CR = 3


_KINDS = frozenset(PlaneKind)


class PayloadError(ValueError):
    """Bytes, or values, that are no payload. ``field`` names the part that is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class PayloadTooLargeError(PayloadError):
    """A payload of more measurements than the reader allows."""


@dataclass(frozen=True, eq=False)
class Plane:
    """One plane's values: int16 (rows, H/B, W/B), measurements or differences of them, in quantiser steps."""

    values: NDArray[np.int16]
    kind: PlaneKind = PlaneKind.LUMA
    quantiser: int = 1


@dataclass(frozen=True, eq=False)
class Payload:
    """What one frame's payload says."""

    operator_id: str
    block: int
    planes: tuple[Plane, ...]

    def pack(self) -> bytes:
        """Lay out in bytes.

        Raises:
            PayloadError: a part that the layout can't express, or that ``unpack`` refuses.
        """
        _check_head(self.block, len(self.planes))
        for plane in self.planes:
            _check_plane(plane.kind, plane.quantiser, plane.values.shape)
            if plane.values.dtype != np.int16:
                raise PayloadError("plane.values", f"{plane.values.dtype}, expected int16")
        bodies = [cascade.encode(plane.values) for plane in self.planes]
        try:
            operator_id = bytes.fromhex(self.operator_id)
            if len(operator_id) != _ID_BYTES:
                raise ValueError(f"operator id of {len(operator_id)} bytes, expected {_ID_BYTES}")
            head = _HEADER.pack(_MAGIC, VERSION, operator_id, self.block, len(self.planes))
            table = [
                _PLANE.pack(plane.kind, _CASCADE, plane.quantiser, *plane.values.shape, len(body))
                for plane, body in zip(self.planes, bodies, strict=True)
            ]
        except (struct.error, ValueError) as error:
            raise PayloadError("payload", f"can't be laid out ({error})") from None
        data = b"".join([head, *table, *bodies])
        return data + _CRC.pack(zlib.crc32(data))

    @classmethod
    def unpack(cls, data: bytes, max_measurements: int = MAX_MEASUREMENTS) -> "Payload":
        """Read a payload, trusting nothing in it.

        Raises:
            PayloadError: anything but a whole, undamaged payload of a version known here.
            PayloadTooLargeError: it announces more than ``max_measurements`` values; nothing was allocated for them.
        """
        announced = announcement(data, max_measurements)
        body = memoryview(data)[_HEADER.size + len(announced.planes) * _PLANE.size : -_CRC.size]
        unpacked = []
        for plane in announced.planes:
            try:
                values = cascade.decode(body[: plane.length], int(np.prod(plane.shape)))
            except cascade.CascadeError as error:
                raise PayloadError("plane.body", str(error)) from None
            unpacked.append(Plane(values.reshape(plane.shape), plane.kind, plane.quantiser))
            body = body[plane.length :]
        return cls(announced.operator_id, announced.block, tuple(unpacked))


@dataclass(frozen=True)
class AnnouncedPlane:
    """What the header says of a plane; ``shape`` is (rows, grid height, grid width), ``length`` in bytes."""

    kind: PlaneKind
    quantiser: int
    shape: tuple[int, int, int]
    length: int


@dataclass(frozen=True)
class Announcement:
    """What a payload's header says, checked; its values are untouched."""

    operator_id: str
    block: int
    planes: tuple[AnnouncedPlane, ...]


def announcement(data: bytes, max_measurements: int = MAX_MEASUREMENTS) -> Announcement:
    """Check checksum and header of a payload, so that a reader can refuse it before anything is unpacked.

    Raises:
        PayloadError: as ``Payload.unpack``, but for damage inside of the planes.
        PayloadTooLargeError: it announces more than ``max_measurements`` values.
    """
    operator_id, block, planes = _checked_header(data)
    entries = tuple(_checked_planes(data, planes, max_measurements))
    body = len(data) - _HEADER.size - planes * _PLANE.size - _CRC.size
    if sum(entry.length for entry in entries) != body:
        raise PayloadError("plane.length", f"planes don't add up to the {body} bytes of the body")
    return Announcement(operator_id.hex(), block, entries)


def _checked_header(data: bytes) -> tuple[bytes, int, int]:
    if len(data) < _HEADER.size + _PLANE.size + _CRC.size:
        raise PayloadError("payload", f"{len(data)} bytes are too few for one")
    magic, version, operator_id, block, planes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise PayloadError("magic", f"{magic!r}, expected {_MAGIC!r}")
    if version != VERSION:
        raise PayloadError("version", f"{version}, this program reads {VERSION}")
    (crc,) = _CRC.unpack_from(data, len(data) - _CRC.size)
    if crc != zlib.crc32(memoryview(data)[: -_CRC.size]):
        raise PayloadError("crc", "damaged on the way")
    _check_head(block, planes)
    if len(data) < _HEADER.size + planes * _PLANE.size + _CRC.size:
        raise PayloadError("planes", f"table of {planes} doesn't fit into {len(data)} bytes")
    return operator_id, block, planes


def _checked_planes(data: bytes, planes: int, max_measurements: int) -> Iterator[AnnouncedPlane]:
    total = 0
    for index in range(planes):
        entry = _PLANE.unpack_from(data, _HEADER.size + index * _PLANE.size)
        kind, coder, quantiser, rows, height, width, length = entry
        if coder != _CASCADE:
            raise PayloadError("plane.coder", f"{coder}, this program reads {_CASCADE}")
        _check_plane(kind, quantiser, (rows, height, width))
        total += rows * height * width
        if total > max_measurements:
            raise PayloadTooLargeError("plane", f"{total} measurements, at most {max_measurements} are allowed")
        yield AnnouncedPlane(PlaneKind(kind), quantiser, (rows, height, width), length)


def _check_head(block: int, planes: int) -> None:
    if block < 2:
        raise PayloadError("block", f"{block}, expected 2 or more")
    if not 1 <= planes <= MAX_PLANES:
        raise PayloadError("planes", f"{planes}, expected 1 to {MAX_PLANES}")


def _check_plane(kind: int, quantiser: int, shape: tuple[int, ...]) -> None:
    if kind not in _KINDS:
        raise PayloadError("plane.kind", f"{kind}, expected one of {', '.join(str(k.value) for k in PlaneKind)}")
    if len(shape) != 3:
        raise PayloadError("plane", f"values of {len(shape)} dimensions, expected rows, grid height, grid width")
    if 0 in (quantiser, *shape):
        rows, height, width = shape
        raise PayloadError("plane", f"quantiser {quantiser}, rows {rows}, grid {height}×{width}: expected above 0")
