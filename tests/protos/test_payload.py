import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from protos.payload import MAX_MEASUREMENTS, Payload, PayloadError, PayloadTooLargeError, Plane, PlaneKind

GOLDEN = Path(__file__).parent / "golden"
OPERATOR = "0123456789abcdef"


def golden_payload() -> Payload:
    luma = (np.arange(3 * 2 * 4).reshape(3, 2, 4) * 7 % 23 - 11).astype(np.int16)
    luma[0, 0, :3] = (127, -128, -300)
    chroma = np.array([[[1, 0, -1]]], np.int16)
    return Payload(OPERATOR, 16, (Plane(luma), Plane(chroma, PlaneKind.CB, 4)))


def small_payload() -> Payload:
    return Payload(OPERATOR, 16, (Plane(np.array([[[3, 0], [-1, 40]]], np.int16)),))


def resealed(data: bytes) -> bytes:
    """The same bytes with a checksum that fits: damage that only the checks behind it can find."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def changed(data: bytes, offset: int, *values: int) -> bytes:
    return resealed(data[:offset] + bytes(values) + data[offset + len(values) :])


planes = st.builds(
    Plane,
    arrays(np.int16, st.tuples(*[st.integers(1, 6)] * 3)),
    st.sampled_from(PlaneKind),
    st.integers(1, 255),
)
payloads = st.builds(
    Payload,
    st.binary(min_size=8, max_size=8).map(bytes.hex),
    st.integers(2, 255),
    st.lists(planes, min_size=1, max_size=4).map(tuple),
)


def test_version_1_is_these_bytes() -> None:
    assert golden_payload().pack() == (GOLDEN / "version1.payload").read_bytes()


def test_version_1_bytes_still_read() -> None:
    read, expected = Payload.unpack((GOLDEN / "version1.payload").read_bytes()), golden_payload()
    assert (read.operator_id, read.block) == (expected.operator_id, expected.block)
    for ours, theirs in zip(read.planes, expected.planes, strict=True):
        assert (ours.kind, ours.quantiser) == (theirs.kind, theirs.quantiser)
        assert np.array_equal(ours.values, theirs.values)


@given(payloads)
def test_what_was_packed_is_unpacked(payload: Payload) -> None:
    read = Payload.unpack(payload.pack())
    assert (read.operator_id, read.block, len(read.planes)) == (payload.operator_id, payload.block, len(payload.planes))
    for ours, theirs in zip(read.planes, payload.planes, strict=True):
        assert (ours.kind, ours.quantiser) == (theirs.kind, theirs.quantiser)
        assert np.array_equal(ours.values, theirs.values)


@given(st.binary(max_size=200))
def test_foreign_bytes_give_its_own_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(PayloadError):
        Payload.unpack(data)


@given(payloads, st.data())
def test_damage_anywhere_is_found(payload: Payload, data: st.DataObject) -> None:
    whole = payload.pack()
    place = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    with pytest.raises(PayloadError):
        Payload.unpack(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
    with pytest.raises(PayloadError):
        Payload.unpack(whole[:place])


@given(payloads, st.data())
def test_hostile_bytes_with_a_fitting_checksum_give_its_own_error_or_a_bounded_payload(
    payload: Payload, data: st.DataObject
) -> None:
    whole = bytearray(payload.pack())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 5))] = data.draw(st.integers(0, 255))
    try:
        read = Payload.unpack(resealed(bytes(whole)), max_measurements=10_000)
    except PayloadError:
        return
    assert sum(plane.values.size for plane in read.planes) <= 10_000


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "payload"),
        (changed(small_payload().pack(), 0, *b"XXX"), "magic"),
        (changed(small_payload().pack(), 3, 2), "version"),
        (changed(small_payload().pack(), 12, 0), "block"),
        (changed(small_payload().pack(), 13, 0), "planes"),
        (changed(small_payload().pack(), 13, 5), "planes"),
        (changed(small_payload().pack(), 14, 9), "plane.kind"),
        (changed(small_payload().pack(), 15, 7), "plane.coder"),
        (changed(small_payload().pack(), 16, 0), "plane"),
        (changed(small_payload().pack(), 17, 0, 0), "plane"),
        (changed(small_payload().pack(), 23, 1, 0, 0, 0), "plane.length"),
        (changed(small_payload().pack(), 19, 9, 0), "plane.body"),
        (small_payload().pack() + b"\0", "crc"),
    ],
)
def test_the_error_names_the_field(data: bytes, field: str) -> None:
    with pytest.raises(PayloadError) as error:
        Payload.unpack(data)
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: ")


def test_an_announcement_of_too_much_is_refused_before_anything_is_unpacked() -> None:
    huge = changed(small_payload().pack(), 17, *b"\xff\xff\xff\xff\xff\xff")
    with pytest.raises(PayloadTooLargeError, match=str(MAX_MEASUREMENTS)):
        Payload.unpack(huge)
    with pytest.raises(PayloadTooLargeError):
        Payload.unpack(small_payload().pack(), max_measurements=3)


@pytest.mark.parametrize(
    "payload",
    [
        Payload("not hexadecimal!", 16, small_payload().planes),
        Payload("0123", 16, small_payload().planes),
        Payload(OPERATOR, 300, small_payload().planes),
        Payload(OPERATOR, 16, (Plane(np.zeros((1, 1, 70_000), np.int16)),)),
        Payload(OPERATOR, 16, (Plane(np.zeros((1, 1, 1), np.int16), PlaneKind.LUMA, 256),)),
    ],
)
def test_what_the_layout_cannot_express_is_not_packed(payload: Payload) -> None:
    with pytest.raises(PayloadError, match="can't be laid out"):
        payload.pack()


ONE = np.ones((1, 1, 1), np.int16)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (Payload(OPERATOR, 1, (Plane(ONE),)), "block"),
        (Payload(OPERATOR, 16, ()), "planes"),
        (Payload(OPERATOR, 16, (Plane(ONE),) * 5), "planes"),
        (Payload(OPERATOR, 16, (Plane(ONE, 9),)), "plane.kind"),  # type: ignore[arg-type]
        (Payload(OPERATOR, 16, (Plane(ONE, quantiser=0),)), "plane"),
        (Payload(OPERATOR, 16, (Plane(ONE), Plane(ONE[:0]))), "plane"),
        (Payload(OPERATOR, 16, (Plane(ONE[0]),)), "plane"),
        (Payload(OPERATOR, 16, (Plane(ONE.astype(np.int32) * 40_000),)), "plane.values"),  # type: ignore[arg-type]
        (Payload(OPERATOR, 16, (Plane(ONE / 2),)), "plane.values"),  # type: ignore[arg-type]
    ],
)
def test_what_would_be_read_as_something_else_or_not_at_all_is_not_packed(payload: Payload, field: str) -> None:
    with pytest.raises(PayloadError) as error:
        payload.pack()
    assert error.value.field == field
