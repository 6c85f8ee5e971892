import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from encoder.cli import DEFAULT_OPERATOR
from encoder.sampling import MID_GREY, Operator, OperatorError, finest_steps, pad_to_blocks
from protos.rules import MAX_LEVEL

SHIPPED = Operator.load(DEFAULT_OPERATOR)
PICTURES = arrays(np.uint8, st.tuples(st.integers(1, 50), st.integers(1, 50)))


def small_operator(rows: int = 3, block: int = 4, seed: int = 0) -> Operator:
    phi = np.linalg.qr(np.random.default_rng(seed).normal(size=(block**2, rows)))[0].T.astype(np.float32)
    return Operator(phi, finest_steps(phi), block)


def grid_of(picture: NDArray[np.uint8], block: int) -> tuple[int, int]:
    return -(-picture.shape[0] // block), -(-picture.shape[1] // block)


@given(PICTURES)
def test_measurements_are_phi_times_the_pixels_of_each_block(picture: NDArray[np.uint8]) -> None:
    operator = small_operator()
    padded = pad_to_blocks(picture, 4).astype(np.float64)
    measured = operator.sample(picture, 3)
    columns = padded.shape[1] // 4
    for index, measurement in enumerate(measured):
        top, left = index // columns * 4, index % columns * 4
        pixels = padded[top : top + 4, left : left + 4].reshape(-1) - MID_GREY
        assert np.allclose(measurement * operator.steps, operator.phi @ pixels, atol=1e-2)


@given(PICTURES, st.integers(1, 3))
def test_a_prefix_of_rows_is_a_prefix_of_measurements(picture: NDArray[np.uint8], rows: int) -> None:
    operator, grid = small_operator(), grid_of(picture, 4)
    all_rows = operator.quantise(operator.sample(picture, 3), grid)
    assert np.array_equal(operator.quantise(operator.sample(picture, rows), grid), all_rows[:rows])


@given(arrays(np.uint8, (16, 16), elements=st.sampled_from([0, 255])) | arrays(np.uint8, (16, 16)))
def test_no_picture_leaves_the_quantiser(picture: NDArray[np.uint8]) -> None:
    assert np.abs(SHIPPED.sample(picture, SHIPPED.rows)).max() <= MAX_LEVEL + 0.5


def test_the_widest_picture_of_each_row_just_fits() -> None:
    for row, step in zip(SHIPPED.phi, SHIPPED.steps, strict=True):
        widest = np.where(row > 0, 255, 0).astype(np.uint8).reshape(16, 16)
        level = row @ (widest.reshape(-1).astype(np.float32) - MID_GREY) / step
        assert MAX_LEVEL * 0.98 < level <= MAX_LEVEL + 0.5


def test_the_first_row_measures_brightness() -> None:
    black, white = (np.full((16, 16), value, np.uint8) for value in (0, 255))
    assert abs(SHIPPED.sample(white, 1)[0, 0] - SHIPPED.sample(black, 1)[0, 0]) > 200


def test_rows_are_ordered_by_energy(photographs: list[NDArray[np.uint8]]) -> None:
    measured = np.concatenate([SHIPPED.sample(picture, SHIPPED.rows) for picture in photographs]) * SHIPPED.steps
    energy = (measured**2).mean(0)
    assert energy[0] > 10 * energy[1]
    groups = [energy[1:9], energy[9:26]], [energy[26:45], energy[45:]], [energy[:26], energy[26:]]
    assert all(first.mean() > 1.5 * second.mean() for first, second in groups)


@pytest.mark.parametrize(("ratio", "rows"), [(0.1, 26), (0.25, 64), (0.0039, 1)])
def test_rows_at_a_ratio(ratio: float, rows: int) -> None:
    assert SHIPPED.rows_for(ratio) == rows


@pytest.mark.parametrize("ratio", [0.0, -1.0, 0.001, 0.5, 1.5, float("nan"), float("inf")])
def test_a_ratio_that_the_operator_cannot_do_is_refused(ratio: float) -> None:
    with pytest.raises(OperatorError, match=r"samples at ratios 0\.0039 to 0\.25"):
        SHIPPED.rows_for(ratio)


def test_a_file_reads_back_and_equal_content_has_equal_bytes_and_id(tmp_path: Path) -> None:
    operator = small_operator()
    for name in ("a.npz", "b.npz"):
        operator.save(tmp_path / name)
    read = Operator.load(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.array_equal(read.phi, operator.phi)
    assert read.id == operator.id
    assert read.id != small_operator(seed=1).id
    assert len(read.id) == 16


@given(data=st.data())
def test_a_damaged_file_gives_its_own_error_or_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("operator") / "damaged.npz"
    small_operator().save(path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        Operator.load(path)
    except OperatorError as error:
        assert str(path) in str(error)


def test_what_is_no_operator_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="no such operator file"):
        Operator.load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(OperatorError, match="not an operator file"):
        Operator.load(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    with pytest.raises(OperatorError, match="not an operator file"):
        Operator.load(tmp_path / "empty.npz")
    np.savez(tmp_path / "pickled.npz", format=np.array(1), block=np.array(4), phi=np.array([{}]), steps=np.ones(1))
    with pytest.raises(OperatorError, match="not an operator file"):
        Operator.load(tmp_path / "pickled.npz")
    np.savez(tmp_path / "newer.npz", format=np.array(9), block=np.array(4), phi=np.ones((1, 16)), steps=np.ones(1))
    with pytest.raises(OperatorError, match="format 9, this program reads 1"):
        Operator.load(tmp_path / "newer.npz")


@pytest.mark.parametrize(
    ("phi", "steps", "block", "problem"),
    [
        (np.ones((2, 16)), np.ones(3), 4, "expected"),
        (np.ones((1, 15)), np.ones(1), 4, "doesn't fit block 4"),
        (np.full((1, 16), np.nan), np.ones(1), 4, "finite"),
        (np.ones((1, 16)), np.zeros(1), 4, "above 0"),
        (np.ones((1, 16)), np.full(1, 0.1), 4, "too fine"),
    ],
)
def test_an_operator_that_cannot_work_is_refused(
    phi: NDArray[np.float64], steps: NDArray[np.float64], block: int, problem: str
) -> None:
    with pytest.raises(OperatorError, match=problem):
        Operator(phi.astype(np.float32), steps.astype(np.float32), block)
