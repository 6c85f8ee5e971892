"""What a payload makes its reader allocate: never more than its checked header allows."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.payload import Payload, PayloadError, PayloadTooLargeError, Plane

BYTES_A_VALUE = 22
"""As the cascade has it."""
OVERHEAD = 1 << 17
BOMB = zlib.compressobj(9, zlib.DEFLATED, -15)
BOMB_BYTES = BOMB.compress(bytes(1 << 28)) + BOMB.flush()
"""256 MiB of zeros in 260 kB."""


def laid_out(level1: bytes, level2: bytes, level3: bytes, shape: tuple[int, int, int]) -> bytes:
    """A payload whose checksum and lengths are right, whatever is in it."""
    body = b"".join([struct.pack("<I", len(part)) + part for part in (level1, level2)]) + level3
    head = struct.pack("<3sB8sBB", b"VCP", 1, bytes(8), 16, 1)
    data = head + struct.pack("<BBBHHHI", 1, 1, 1, *shape, len(body)) + body
    return data + struct.pack("<I", zlib.crc32(data))


def deflated(data: bytes) -> bytes:
    coder = zlib.compressobj(6, zlib.DEFLATED, -15)
    return coder.compress(data) + coder.flush()


def allocated(data: bytes, most: int = 1 << 24) -> tuple[int, Payload | PayloadError]:
    """The most bytes held at once while a payload is unpacked, and what came of it.

    The least of three tries: what else lives in this process allocates too, but not each time.
    """
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        try:
            told: Payload | PayloadError = Payload.unpack(data, most)
        except PayloadError as error:
            told = error
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    return min(peaks), told


def allowed(values: int, data: bytes) -> int:
    return BYTES_A_VALUE * values + 2 * len(data) + OVERHEAD


@pytest.mark.parametrize("level", [1, 2, 3])
def test_what_unpacks_to_more_than_was_announced_is_cut_off_there(level: int) -> None:
    escapes = deflated(b"\xff" * 4)  # 16 values, all in level 2
    parts = [escapes, deflated(b"\x80" * 16), bytes(32)]
    parts[level - 1] = bytes(1 << 22) if level == 3 else BOMB_BYTES
    data = laid_out(parts[0], parts[1], parts[2], (1, 4, 4))
    peak, told = allocated(data)
    assert isinstance(told, PayloadError)
    assert f"level {level}" in str(told)
    assert peak < allowed(16, data)


def test_a_header_of_more_values_than_allowed_costs_nothing() -> None:
    data = laid_out(BOMB_BYTES, BOMB_BYTES, b"", (65_535, 65_535, 65_535))
    peak, told = allocated(data, 1 << 16)
    assert isinstance(told, PayloadTooLargeError)
    assert peak < OVERHEAD


def test_an_announcement_without_the_values_costs_no_more_than_the_values_that_came() -> None:
    data = laid_out(deflated(bytes(100)), b"", b"", (255, 255, 255))
    peak, told = allocated(data)
    assert isinstance(told, PayloadError)
    assert peak < OVERHEAD


@settings(max_examples=60)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    parts=st.lists(
        st.binary(max_size=300).map(deflated) | st.binary(max_size=300) | st.just(BOMB_BYTES), min_size=2, max_size=2
    ),
    tail=st.binary(max_size=100),
)
def test_whatever_a_body_holds_is_within_its_header(
    data: st.DataObject, shape: tuple[int, int, int], parts: list[bytes], tail: bytes
) -> None:
    packed = laid_out(parts[0], parts[1], tail, shape)
    values = int(np.prod(shape))
    peak, _ = allocated(packed)
    assert peak < allowed(values, packed)


@pytest.mark.parametrize("values", ["near", "far", "farther"])
def test_sound_ones_keep_to_it_too(values: str) -> None:
    made = np.full((64, 60, 80), {"near": 1, "far": 100, "farther": 1000}[values], np.int16)
    data = Payload("0" * 16, 16, (Plane(made),)).pack()
    peak, told = allocated(data)
    assert isinstance(told, Payload)
    assert np.array_equal(told.planes[0].values, made)
    assert peak < allowed(made.size, data)
