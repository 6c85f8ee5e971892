"""Integer forms of reconstructors, from the shipped file and drawn pictures."""

import json
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from decoder.catalogue import SHIPPED, load_catalogue
from decoder.model import read_model
from encoder.cli import DEFAULT_OPERATOR
from encoder.sampling import Operator
from tests.encoder.test_sampling import small_operator
from train import quantise
from train.data.labelled import Labelled
from train.data.leaves import dead_leaves
from train.data.photographs import read_gray
from train.export import ExportError
from train.loops.schedule import described
from train.readers import Reader
from train.settings import StepsRun

PICTURES = 8


@pytest.fixture(scope="module")
def leaves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaves")
    for seed in range(PICTURES):
        cv2.imwrite(str(folder / f"{seed}.png"), dead_leaves(256, 100 + seed))
    cv2.imwrite(str(folder / "small.png"), dead_leaves(64, 1))
    return folder


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "CALIBRATED_ON", PICTURES // 2)
    monkeypatch.setattr(quantise, "CHECKED_ON", PICTURES // 2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "plain.onnx"
    path.write_bytes((SHIPPED / "plain-r10.onnx").read_bytes())
    return path


@pytest.mark.parametrize("precision", quantise.PRECISIONS)
def test_an_integer_form_is_as_good_and_a_server_takes_it(model: Path, leaves: Path, precision: str) -> None:
    out = model.with_suffix(f".{precision}.onnx")
    seen = []
    operator = Operator.load(DEFAULT_OPERATOR)
    told = quantise.quantise(model, operator, [leaves], out, precision, progress=lambda: seen.append(1))
    assert told["pictures"] == len(seen) == PICTURES // 2
    assert abs(told["lost_db"]) <= 0.1
    assert 40 < told["agreement_db"] < 70, "integers differ, a little"
    form, base = read_model(out), read_model(model)
    assert (form.precision, form.of, form.rows) == (precision, base.id, base.rows)
    assert form.told["rendition"] == "plain"
    assert out.stat().st_size < 0.6 * model.stat().st_size
    if precision == "int8":
        (served,) = load_catalogue([model, out], "onnxruntime-int8", 1).reconstructors
        assert (served.id, served.engine.model.precision) == (base.id, "int8")


def test_a_veil_is_looked_at_through_both_forms(leaves: Path, tmp_path: Path) -> None:
    veil, out, operator = SHIPPED / "veil-r10.onnx", tmp_path / "out.onnx", Operator.load(DEFAULT_OPERATOR)
    with pytest.raises(ExportError, match="a veil, expected labelled pictures and readers"):
        quantise.quantise(veil, operator, [leaves], out, "int8")
    items = [Labelled(path, 7) for path in sorted(leaves.glob("?.png"))]
    looks = count()

    def reader(first: int, second: int) -> Reader:
        """Looks at a picture through float32, then through integers, and says what it is told to."""
        return lambda pictures: torch.eye(1000)[[(first, second)[next(looks) % 2]]]

    told = quantise.quantise(veil, operator, [leaves], out, "int8", items, {"steady": reader(7, 7)})
    assert told["labelled"] == PICTURES
    assert told["recognition"] == {"steady": {"float32": 100.0, "int8": 100.0}}
    assert json.loads(read_model(out).told["quantised"]) == told
    out.unlink()
    with pytest.raises(ExportError, match=r"through int8 readers read 100\.0 % instead of 0\.0; nothing was written"):
        quantise.quantise(veil, operator, [leaves], out, "int8", items, {"keen": reader(1, 7)})
    assert not out.exists()


def test_photographs_are_checked_with_one_after_the_other(
    model: Path, leaves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that aren't calibrated on; the later ones are only read once the earlier ones have been checked with."""
    read, readings = [], []

    def counted(path: Path) -> NDArray[np.uint8]:
        read.append(path)
        return read_gray(path)

    monkeypatch.setattr(quantise, "read_gray", counted)
    monkeypatch.setattr(quantise, "CHECKED_ON", 1)
    operator, out = Operator.load(DEFAULT_OPERATOR), model.with_suffix(".int8.onnx")
    told = quantise.quantise(model, operator, [leaves], out, "int8", progress=lambda: readings.append(len(read)))
    assert told["pictures"] == PICTURES // 2
    assert readings == sorted(set(readings)), "each is read when its turn comes"


def test_a_layer_whose_weights_are_computed_is_told(model: Path, leaves: Path) -> None:
    loaded = onnx.load(model)
    (layer, *_) = (node for node in loaded.graph.node if node.op_type == "Conv")
    computed = onnx.helper.make_node("Identity", [layer.input[1]], ["computed"])
    layer.input[1] = "computed"
    loaded.graph.node.insert(0, computed)
    onnx.save(loaded, model)
    with pytest.raises(ExportError, match=r"plain\.onnx: layer .*: weights 'computed' aren't an initializer"):
        quantise.quantise(model, Operator.load(DEFAULT_OPERATOR), [leaves], model.with_name("out.onnx"), "int8")
    assert not model.with_name("out.onnx").exists()


def test_a_decoder_that_takes_steps_stays_in_floats(model: Path, leaves: Path) -> None:
    loaded = onnx.load(model)
    told = {each.key: each.value for each in loaded.metadata_props}
    onnx.helper.set_model_props(loaded, told | {"veilcam.run": json.dumps(described(StepsRun()))})
    onnx.save(loaded, model)
    with pytest.raises(ExportError, match=r"plain\.onnx: takes steps along gradients"):
        quantise.quantise(model, Operator.load(DEFAULT_OPERATOR), [leaves], model.with_name("out.onnx"), "int8")
    assert not model.with_name("out.onnx").exists()


def test_what_cannot_be_quantised_is_told_and_nothing_is_written(
    model: Path, leaves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, out = Operator.load(DEFAULT_OPERATOR), tmp_path / "out.onnx"
    with pytest.raises(ExportError, match=rf"expected a reconstructor of {small_operator().id}"):
        quantise.quantise(model, small_operator(), [leaves], out, "int8")
    with pytest.raises(ExportError, match="is int8 already"):
        quantise.quantise(SHIPPED / "veil-r10.int8.onnx", operator, [leaves], out, "int8")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ExportError, match=r"text\.onnx: not an ONNX file"):
        quantise.quantise(tmp_path / "text.onnx", operator, [leaves], out, "int8")
    with monkeypatch.context() as patch:
        patch.setattr(quantise, "MOST_LOST_DB", -1.0)
        with pytest.raises(ExportError, match=r"at most -1\.0 are allowed; nothing was written"):
            quantise.quantise(model, operator, [leaves], out, "int8")
    monkeypatch.setattr(quantise, "CHECKED_ON", 100)
    with pytest.raises(ExportError, match=rf"{PICTURES} photographs of 256 pixels and more, expected at least 104"):
        quantise.quantise(model, operator, [leaves], out, "int8")
    assert not out.exists()


def test_dead_leaves_have_edges_and_the_slope_of_photographs() -> None:
    picture = dead_leaves(256, 0).astype(np.float64)
    assert np.array_equal(picture, dead_leaves(256, 0))
    assert not np.array_equal(picture, dead_leaves(256, 1))
    power = np.abs(np.fft.fft2(picture - picture.mean())) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    bands = [power[(frequency > low) & (frequency <= 2 * low)].mean() for low in (1 / 64, 1 / 32, 1 / 16)]
    slope = np.diff(np.log2(bands)).mean()
    assert -4 < slope < -1, "power falls by about the square of frequency"
