import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from protos.cascade import CascadeError, decode, encode

INT16 = arrays(np.int16, array_shapes(max_dims=3, max_side=40))
MEASUREMENTS = arrays(np.int16, st.integers(1, 400), elements=st.integers(-6, 6))


@given(INT16 | MEASUREMENTS)
def test_what_was_encoded_is_decoded(values: np.ndarray) -> None:
    assert np.array_equal(decode(encode(values), values.size), values.reshape(-1))


@pytest.mark.parametrize("value", [0, 1, -1, 2, -2, 127, -127, 128, -128, 129, 32767, -32768])
def test_values_at_the_edges_of_each_level(value: int) -> None:
    values = np.array([0, value, 1, value, -1], np.int16)
    assert np.array_equal(decode(encode(values), 5), values)


@given(st.binary(max_size=300), st.integers(1, 2000))
def test_foreign_bytes_give_its_own_error_and_nothing_else(data: bytes, count: int) -> None:
    with pytest.raises(CascadeError):
        decode(data, count)


@given(MEASUREMENTS, st.data())
def test_another_count_is_refused(values: np.ndarray, data: st.DataObject) -> None:
    coded = encode(values)
    # Up to three values of padding are indistinguishable from zeros at the end only if they are zeros: never shorter.
    other = data.draw(st.integers(1, values.size + 40).filter(lambda n: -(-n // 4) != -(-values.size // 4)))
    with pytest.raises(CascadeError):
        decode(coded, other)


def test_a_deflate_bomb_is_cut_off_at_the_size_that_the_count_allows() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    level = bomb.compress(bytes(50_000_000)) + bomb.flush()
    with pytest.raises(CascadeError, match="doesn't hold 25 bytes"):
        decode(len(level).to_bytes(4, "little") + level + bytes(4), 100)


def test_peaked_values_cost_little_more_than_their_entropy() -> None:
    values = np.rint(np.random.default_rng(0).laplace(scale=1.5, size=200_000)).astype(np.int16)
    _, counts = np.unique(values, return_counts=True)
    share = counts / values.size
    entropy_bytes = -(share * np.log2(share)).sum() * values.size / 8
    assert len(encode(values)) < 1.06 * entropy_bytes
