from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from decoder.catalogue import SHIPPED, Catalogue, CatalogueError, load_catalogue
from decoder.engines import ENGINES, Engine, EngineError, open_engine
from encoder.sampling import Operator

METADATA = {"format": "1", "rendition": "plain", "operator_id": "0" * 16, "block": "2"}


def write_model(path: Path, metadata: dict[str, str], rows: int = 1, kind: int = TensorProto.INT8) -> Path:
    """A real reconstructor of 2×2 blocks: every pixel is 128 plus the block's first measurement."""
    measurements = helper.make_tensor_value_info("measurements", kind, ["n", rows, "h", "w"])
    pictures = helper.make_tensor_value_info("pictures", TensorProto.UINT8, ["n", "H", "W"])
    weight = np.zeros((4, rows, 1, 1), np.float32)
    weight[:, 0] = 1
    constants = [
        onnx.numpy_helper.from_array(weight, "weight"),
        onnx.numpy_helper.from_array(np.array(128, np.float32), "grey"),
        onnx.numpy_helper.from_array(np.array([1]), "axis"),
    ]
    nodes = [
        helper.make_node("Cast", ["measurements"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "weight"], ["blocks"]),
        helper.make_node("DepthToSpace", ["blocks"], ["centred"], blocksize=2),
        helper.make_node("Add", ["centred", "grey"], ["whole"]),
        helper.make_node("Squeeze", ["whole", "axis"], ["gray"]),
        helper.make_node("Cast", ["gray"], ["pictures"], to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(nodes, "tiny", [measurements], [pictures], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {f"veilcam.{key}": value for key, value in metadata.items()})
    onnx.save(model, path)
    return path


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    """Every engine goes through the same cases."""
    return open_engine(request.param, write_model(tmp_path / "tiny.onnx", METADATA, rows=3), 1)


def test_an_engine_gives_the_pictures_of_its_measurements(engine: Engine) -> None:
    measurements = np.zeros((2, 3, 1, 2), np.int8)
    measurements[0, 0, 0] = (-100, 27)
    pictures = engine.reconstruct(measurements)
    assert pictures.shape == (2, 2, 4)
    assert pictures[0].tolist() == [[28, 28, 155, 155]] * 2
    assert (pictures[1] == 128).all()


def test_an_engine_tells_what_it_runs_on(engine: Engine) -> None:
    assert engine.name in ENGINES
    assert engine.device
    assert (engine.threads, engine.rows, engine.block) == (1, 3, 2)


@pytest.mark.parametrize("measurements", [np.zeros((1, 2, 1, 1), np.int8), np.zeros((1, 3, 1, 1), np.int16)])
def test_an_engine_refuses_what_its_model_does_not_take(engine: Engine, measurements: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected int8 \(N, 3"):
        engine.reconstruct(measurements)


def test_an_engine_that_is_unknown() -> None:
    with pytest.raises(EngineError, match="'abacus': expected one of onnxruntime"):
        open_engine("abacus", SHIPPED, 1)


def test_what_ships_for_each_ratio(catalogue: Catalogue, operator: Operator) -> None:
    assert catalogue.operators() == {operator.id}
    assert catalogue.block(operator.id) == operator.block
    for rendition, ratio in (("plain", 0.1), ("plain", 0.25), ("veiled", 0.1)):
        rows = operator.rows_for(ratio)
        chosen = catalogue.choose(operator.id, rendition, rows)
        assert chosen is not None
        assert (chosen.rendition, chosen.engine.rows) == (rendition, rows)


def test_a_veil_ships_with_what_was_measured_of_it(catalogue: Catalogue) -> None:
    veils = [each for each in catalogue.reconstructors if each.rendition == "veiled"]
    for veil in veils:
        assert veil.measured["pictures"] > 100
        assert veil.measured["psnr"]["plain"] > veil.measured["psnr"]["veiled"] > 20
        assert set(veil.measured["trained_against"]) < set(veil.measured["recognition"])


@pytest.mark.parametrize(("rows", "chosen"), [(1, 3), (3, 3), (4, 9), (9, 9), (12, 9)])
def test_the_reconstructor_that_wastes_least(tmp_path: Path, rows: int, chosen: int) -> None:
    for size in (3, 9):
        write_model(tmp_path / f"rows{size}.onnx", METADATA, size)
    catalogue = load_catalogue([tmp_path], "onnxruntime", 1)
    found = catalogue.choose("0" * 16, "plain", rows)
    assert found is not None
    assert found.engine.rows == chosen
    assert catalogue.choose("0" * 16, "veiled", rows) is None
    assert catalogue.choose("1" * 16, "plain", rows) is None


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (METADATA | {"format": "2"}, "veilcam.format is 2, expected 1"),
        (METADATA | {"rendition": "sharp"}, "veilcam.rendition and veilcam.operator_id"),
        (METADATA | {"operator_id": ""}, "veilcam.rendition and veilcam.operator_id"),
        (METADATA | {"block": "wide"}, "veilcam.block"),
        (METADATA | {"measured": "{"}, "veilcam.measured is not JSON"),
        ({}, "veilcam.format is None"),
    ],
)
def test_metadata_that_is_missing_or_wrong_is_told(tmp_path: Path, metadata: dict[str, str], problem: str) -> None:
    path = write_model(tmp_path / "model.onnx", metadata)
    with pytest.raises(CatalogueError, match=problem) as error:
        load_catalogue([path], "onnxruntime", 1)
    assert str(path) in str(error.value)


def test_files_that_are_no_reconstructors_are_told(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="no reconstructor"):
        load_catalogue([tmp_path], "onnxruntime", 1)
    with pytest.raises(CatalogueError, match="no reconstructor"):
        load_catalogue([tmp_path / "absent.onnx"], "onnxruntime", 1)
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(CatalogueError, match=r"text\.onnx: not a model that onnxruntime runs"):
        load_catalogue([tmp_path / "text.onnx"], "onnxruntime", 1)
    other = write_model(tmp_path / "other.onnx", METADATA, kind=TensorProto.INT32)
    with pytest.raises(CatalogueError, match="one int8 input"):
        load_catalogue([other], "onnxruntime", 1)
