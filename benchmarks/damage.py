"""Messages of a camera, damaged as lines, faulty cameras and attackers would: what ``faults`` sends.

A payload ends with a checksum, which stops what a line does to it. Whoever means harm mends that: some kinds do.
"""

import random
import struct
import zlib
from collections.abc import Callable

from protos.v1 import veilcam_pb2 as pb

_TABLE_AT, _TABLE = 17, struct.Struct("<HHHI")
"""Of a payload's first plane: rows, grid height, grid width, bytes of its body (``protos/payload.py``)."""
_BODY_AT, _CRC = 27, struct.Struct("<I")
_TOO_LARGE = 9 << 20
"""Bytes; a service takes 8 MiB if it isn't told otherwise."""


def damaged(frame: pb.Frame, kind: str, draw: random.Random) -> bytes:
    """A ``PublishRequest`` with a frame, damaged.

    Args:
        frame: a sound one; it stays so.
        kind: one of ``KINDS``.
        draw: chooses where and how.
    """
    copy = pb.Frame()
    copy.CopyFrom(frame)
    return KINDS[kind](copy, draw)


def message(frame: pb.Frame) -> bytes:
    """As it goes over the line."""
    return pb.PublishRequest(frame=frame).SerializeToString()


def _bits(frame: pb.Frame, draw: random.Random) -> bytes:
    return _flipped(message(frame), 0, draw)


def _cut(frame: pb.Frame, draw: random.Random) -> bytes:
    whole = message(frame)
    return whole[: draw.randrange(len(whole))]


def _noise(frame: pb.Frame, draw: random.Random) -> bytes:
    return draw.randbytes(draw.randrange(1, 2 * frame.ByteSize()))


def _sequence(frame: pb.Frame, draw: random.Random) -> bytes:
    frame.sequence = draw.choice([0, 1, frame.sequence - 1, 1 << 63, (1 << 64) - 1])
    return message(frame)


def _base(frame: pb.Frame, draw: random.Random) -> bytes:
    frame.kind = draw.choice([0, pb.FRAME_KIND_KEY, pb.FRAME_KIND_DELTA, 77])  # type: ignore[assignment]
    frame.base_sequence = draw.choice([0, frame.sequence - 1, frame.sequence, draw.getrandbits(64)])
    return message(frame)


def _time(frame: pb.Frame, draw: random.Random) -> bytes:
    frame.capture_time_ns = draw.choice([0, -1, 1, -(1 << 63), (1 << 63) - 1, draw.getrandbits(62)])
    return message(frame)


def _length(frame: pb.Frame, draw: random.Random) -> bytes:
    rows, height, width, length = _TABLE.unpack_from(frame.payload, _TABLE_AT)
    length = draw.choice([0, length - 1, length + 1, length // 2, 2 * length, (1 << 32) - 1])
    return _with_table(frame, rows, height, width, length)


def _size(frame: pb.Frame, draw: random.Random) -> bytes:
    if not draw.randrange(4):
        frame.payload = bytes(_TOO_LARGE)
        return message(frame)
    rows, height, width, length = _TABLE.unpack_from(frame.payload, _TABLE_AT)
    rows, height, width = draw.choice([(65535, height, width), (rows, 65535, 65535), (65535,) * 3, (0, height, width)])
    return _with_table(frame, rows, height, width, length)


def _body(frame: pb.Frame, draw: random.Random) -> bytes:
    sound = frame.payload[: -_CRC.size]
    frame.payload = _mended(_flipped(sound, min(_BODY_AT, len(sound) - 1), draw))
    return message(frame)


def _header(frame: pb.Frame, draw: random.Random) -> bytes:
    sound = frame.payload[: -_CRC.size]
    frame.payload = _mended(_flipped(sound[:_BODY_AT], 0, draw) + sound[_BODY_AT:])
    return message(frame)


KINDS: dict[str, Callable[[pb.Frame, random.Random], bytes]] = {
    "bits flipped": _bits,
    "cut short": _cut,
    "random bytes": _noise,
    "wrong sequence": _sequence,
    "wrong kind or base": _base,
    "wrong time": _time,
    "wrong length, mended": _length,
    "absurd size": _size,
    "header bits flipped, mended": _header,
    "body bits flipped, mended": _body,
}
"""What it is called → how it is done; *mended* has a checksum that is right again."""


def _flipped(data: bytes, begin: int, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 16)):
        changed[draw.randrange(begin, len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _with_table(frame: pb.Frame, *table: int) -> bytes:
    sound = bytearray(frame.payload[: -_CRC.size])
    _TABLE.pack_into(sound, _TABLE_AT, *table)
    frame.payload = _mended(bytes(sound))
    return message(frame)


def _mended(sound: bytes) -> bytes:
    return sound + _CRC.pack(zlib.crc32(sound))
