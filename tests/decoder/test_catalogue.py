import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from decoder.catalogue import SHIPPED, Catalogue, CatalogueError, load_catalogue
from decoder.engines import ENGINES, Engine, EngineError, Kind, open_engine
from decoder.engines.choice import fastest
from decoder.engines.onnx_runtime import OnnxRuntimeEngine
from decoder.model import PRECISIONS, RENDITIONS, Model, ModelError, read_model
from decoder.sums import SumsError, read_sums
from encoder.sampling import Operator

NOT_HERE = re.compile("pip install|no NVIDIA GPU here")
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
    precision = ENGINES[request.param].precisions[0]
    metadata = METADATA | {"precision": precision}
    model = read_model(write_model(tmp_path / "tiny.onnx", metadata, rows=3))
    try:
        return open_engine(request.param, {precision: model}, 1)
    except EngineError as error:
        if not NOT_HERE.search(str(error)):
            raise
        pytest.skip(str(error))


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
    with pytest.raises(EngineError, match="'abacus': expected one of auto, onnxruntime"):
        open_engine("abacus", {}, 1)


def test_an_engine_without_a_file_of_its_precision(tmp_path: Path) -> None:
    model = read_model(write_model(tmp_path / "tiny.onnx", METADATA))
    with pytest.raises(EngineError, match=r"tiny\.onnx has no int8 form \(veilcam-train quantise makes one\)"):
        open_engine("onnxruntime-int8", {"float32": model}, 1)


def test_the_fastest_that_agrees_is_taken_and_all_are_told() -> None:
    """On what ships: every engine that is installed gives the picture of the reference, integers nearly so."""
    forms = {}
    for path in sorted(SHIPPED.glob("veil-r10*.onnx")):
        model = read_model(path)
        forms[model.precision] = model
    assert set(forms) == set(PRECISIONS)
    engine, tried = fastest(forms, 1)
    assert [each.name for each in tried] == list(ENGINES)
    told = {each.name: each for each in tried}
    assert told["onnxruntime-int8"].problem == ""
    assert 45 < (told["onnxruntime-int8"].agreement_db or 0) < 60
    timed = {each.name: each.milliseconds for each in tried if each.milliseconds is not None}
    assert engine.name == min(timed, key=lambda name: timed[name])
    for each in tried:
        assert each.problem == "" or NOT_HERE.search(each.problem)
        if each.name == "openvino" and not each.problem:
            assert (each.agreement_db or 0) > 50


def test_an_engine_that_does_not_agree_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An integer file that isn't what was measured, a runtime that is missing, and one that fails: none is taken."""
    swapped = {
        "float32": read_model(SHIPPED / "veil-r10.onnx"),
        "int8": read_model(SHIPPED / "plain-r10.int8.onnx"),
    }
    monkeypatch.setitem(ENGINES, "missing", Kind("decoder.engines.nowhere:Nothing", ("float32",), "nothing"))
    monkeypatch.setitem(ENGINES, "broken", Kind("tests.decoder.test_catalogue:Broken", ("float32",), "nothing"))
    engine, tried = fastest(swapped, 1)
    told = {each.name: each for each in tried}
    assert "refused, expected 5" in told["onnxruntime-int8"].problem
    assert told["onnxruntime-int8"].milliseconds is None
    assert "pip install 'veilcam[nothing]'" in told["missing"].problem
    assert told["broken"].problem.endswith("veil-r10.onnx: fails (RuntimeError: no such device)")
    assert engine.name in ("onnxruntime", "openvino")
    assert "refused" in str(told["onnxruntime-int8"])


def test_an_engine_that_fails_while_it_is_timed_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "small", Kind("tests.decoder.test_catalogue:Small", ("float32",), "nothing"))
    engine, tried = fastest({"float32": read_model(SHIPPED / "veil-r10.onnx")}, 1)
    told = {each.name: each for each in tried}
    assert told["small"].problem.endswith("veil-r10.onnx: fails (RuntimeError: no room for 15×20)")
    assert (told["small"].milliseconds, engine.name != "small") == (None, True)
    assert told[engine.name].milliseconds is not None


class Small(OnnxRuntimeEngine):
    """It has room for what it is compared with, and not for what it is timed with."""

    def _run(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        if measurements.shape[2:] == (15, 20):
            raise RuntimeError("no room for 15×20")
        return super()._run(measurements)


class Broken(Engine):
    def _run(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        raise RuntimeError("no such device")


def test_an_engine_asked_for_by_name_must_agree_too(tmp_path: Path) -> None:
    swapped, veil = onnx.load(SHIPPED / "plain-r10.int8.onnx"), SHIPPED / "veil-r10.onnx"
    for told in swapped.metadata_props:
        if told.key == "veilcam.of":
            told.value = read_model(veil).id
    onnx.save(swapped, tmp_path / "swapped.int8.onnx")
    with pytest.raises(EngineError, match=r"engine onnxruntime-int8: .*swapped.* dB, refused, expected 5\d\.\d dB to"):
        load_catalogue([veil, tmp_path / "swapped.int8.onnx"], "onnxruntime-int8", 1)
    (served,) = load_catalogue([veil, SHIPPED / "veil-r10.int8.onnx"], "onnxruntime-int8", 1).reconstructors
    assert served.engine.name == "onnxruntime-int8"


class Failing(Engine):
    """A runtime that fails while it opens a file."""

    problem: Exception

    def __init__(self, name: str, model: Model, threads: int) -> None:
        raise self.problem

    def _run(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        raise AssertionError


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (ImportError("no module named cuda"), r"engine failing: no module named cuda; install it with pip install"),
        (RuntimeError("driver too old\nmore"), r"engine failing: .*tiny\.onnx: fails \(RuntimeError: driver too old\)"),
        (MemoryError(), r"engine failing: .*tiny\.onnx: fails \(MemoryError: it doesn't say why\)"),
    ],
)
def test_an_engine_that_cannot_be_opened_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, told: str
) -> None:
    monkeypatch.setitem(ENGINES, "failing", Kind("tests.decoder.test_catalogue:Failing", ("float32",), "nothing"))
    monkeypatch.setattr(Failing, "problem", problem, raising=False)
    model = read_model(write_model(tmp_path / "tiny.onnx", METADATA))
    with pytest.raises(EngineError, match=told) as error:
        open_engine("failing", {"float32": model}, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("of", "told"), [({"of": "f" * 16}, "f{16}"), ({}, "[0-9a-f]{16}")])
def test_an_integer_form_of_a_file_that_is_not_there(tmp_path: Path, of: dict[str, str], told: str) -> None:
    path = write_model(tmp_path / "tiny.int8.onnx", METADATA | {"precision": "int8"} | of)
    problem = rf"tiny\.int8\.onnx: is int8 of {told}, which isn't among the files given"
    with pytest.raises(CatalogueError, match=problem):
        load_catalogue([path], "onnxruntime", 1)


def test_an_integer_form_that_takes_other_measurements_than_its_file(tmp_path: Path) -> None:
    base = write_model(tmp_path / "tiny.onnx", METADATA, rows=3)
    metadata = METADATA | {"precision": "int8", "of": read_model(base).id}
    form = write_model(tmp_path / "tiny.int8.onnx", metadata, rows=2)
    with pytest.raises(CatalogueError, match=r"tiny\.int8\.onnx: 2 rows of blocks of 2, .*tiny\.onnx has 3 and 2"):
        load_catalogue([base, form], "auto", 1)


def test_an_engine_is_rebuilt_from_the_file_that_was_checked(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.onnx", METADATA)
    (served,) = load_catalogue([path], "onnxruntime", 1).reconstructors
    path.write_text("replaced")
    assert (served.engine.reopened().reconstruct(np.zeros((1, 1, 1, 1), np.int8)) == 128).all()


def test_only_the_renditions_that_are_asked_for_are_opened(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / f"{each}.onnx", METADATA | {"rendition": each}) for each in RENDITIONS]
    (served,) = load_catalogue(paths, "onnxruntime", 1, ["veiled"]).reconstructors
    assert (served.rendition, served.name) == ("veiled", "veiled")


def test_every_reconstructor_that_ships_has_integer_forms_that_lose_little() -> None:
    models = [read_model(path) for path in SHIPPED.glob("*.onnx")]
    bases = {model.id for model in models if model.of == model.id}
    for precision in PRECISIONS:
        assert {model.of for model in models if model.precision == precision} == bases
    for model in models:
        if model.precision != "float32":
            assert json.loads(model.told["quantised"])["lost_db"] <= 0.1


@given(sample=st.text(max_size=40), fidelity=st.text(max_size=6))
def test_any_sample_is_measurements_or_told(sample: str, fidelity: str) -> None:
    told = {"sample": sample, "sample_psnr": fidelity}
    model = Model(Path("x.onnx"), "0" * 16, told, 1, 2, b"")
    with pytest.raises(ModelError, match=r"x\.onnx: metadata veilcam\.sample"):
        model.sample()


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


def test_two_reconstructors_for_the_same_measurements_are_refused(tmp_path: Path) -> None:
    for name, change in {
        "a": {},
        "b": {"name": "b"},
        "c": {"rendition": "veiled"},
        "d": {"operator_id": "f" * 16},
    }.items():
        write_model(tmp_path / f"{name}.onnx", METADATA | change)
    write_model(tmp_path / "e.onnx", METADATA, 3)
    with pytest.raises(
        CatalogueError, match=r"a\.onnx and .*b\.onnx: each is a plain reconstructor of 1 rows for operator 0+; name"
    ):
        load_catalogue([tmp_path], "onnxruntime", 1)
    (tmp_path / "b.onnx").unlink()
    assert len(load_catalogue([tmp_path, tmp_path / "a.onnx"], "onnxruntime", 1).reconstructors) == 4


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (METADATA | {"format": "2"}, "veilcam.format is 2, expected 1"),
        (METADATA | {"rendition": "sharp"}, "veilcam.rendition and veilcam.operator_id"),
        (METADATA | {"operator_id": ""}, "veilcam.rendition and veilcam.operator_id"),
        (METADATA | {"block": "wide"}, "veilcam.block"),
        (METADATA | {"precision": "int3"}, "veilcam.precision: expected one of float32, int8"),
        (METADATA | {"measured": "{"}, "veilcam.measured is not JSON"),
        (METADATA | {"measured": "7"}, "veilcam.measured is 7, expected a JSON object"),
        (METADATA | {"quantised": "{'"}, "veilcam.quantised is not JSON"),
        (METADATA | {"quantised": "[]"}, r"veilcam.quantised is \[\], expected a JSON object"),
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


def test_a_signal_is_survived_once_engines_were_let_go() -> None:
    """Each of OpenVINO's cores sets a signal stack; freed in another order than made, they leave one that is gone."""
    pytest.importorskip("openvino")
    program = """
import os, signal
from decoder.catalogue import SHIPPED, read_forms
from decoder.engines import open_engine
signal.signal(signal.SIGHUP, lambda *_: print("heard"))
(forms,) = read_forms([SHIPPED / "plain-r10.onnx", SHIPPED / "plain-r10.int8.onnx"])
first, second = (open_engine(name, forms, 1) for name in ("openvino", "openvino-int8"))
del first
del second
os.kill(os.getpid(), signal.SIGHUP)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def sums(folder: Path, *names: str) -> None:
    """As ``sha256sum`` writes them."""
    told = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True)
    (folder / "SHA256SUMS").write_text(told.stdout)


@pytest.mark.parametrize("folder", [SHIPPED, SHIPPED / "light", SHIPPED / "strong"], ids=lambda folder: folder.name)
def test_the_sums_of_the_shipped_files_are_those_of_the_shipped_files(folder: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, f"run make sums\n{done.stdout}{done.stderr}"
    assert set(read_sums(folder) or ()) == {path.name for path in folder.glob("*.onnx")}, "run make sums"


def test_sums_beside_models_hold_for_each_of_them(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a.onnx", METADATA)
    assert len(load_catalogue([tmp_path], "onnxruntime", 1).reconstructors) == 1, "without any, all are taken"
    sums(tmp_path, "a.onnx")
    assert len(load_catalogue([tmp_path, model], "onnxruntime", 1).reconstructors) == 1

    other = write_model(tmp_path / "b.onnx", METADATA | {"rendition": "veiled"})
    with pytest.raises(CatalogueError, match=r"b\.onnx: not in the SHA256SUMS beside it \(sha256sum"):
        load_catalogue([tmp_path], "onnxruntime", 1)
    with pytest.raises(CatalogueError, match=r"b\.onnx: not in the SHA256SUMS"):
        load_catalogue([other], "onnxruntime", 1)
    sums(tmp_path, "a.onnx", "b.onnx")
    changed = bytearray(model.read_bytes())
    changed[-1] ^= 1
    model.write_bytes(changed)
    with pytest.raises(CatalogueError, match=r"a\.onnx: SHA-256 is [0-9a-f]{64}, the SHA256SUMS beside it says"):
        load_catalogue([tmp_path], "onnxruntime", 1)
    model.unlink()
    with pytest.raises(CatalogueError, match=r"a\.onnx: not there, and the SHA256SUMS beside it names it"):
        load_catalogue([tmp_path], "onnxruntime", 1)


def test_shipped_models_are_not_used_without_their_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "a.onnx", METADATA)
    monkeypatch.setattr("decoder.sums.SHIPPED", tmp_path)
    with pytest.raises(CatalogueError, match="SHA256SUMS: not there, and shipped reconstructors aren't used without"):
        load_catalogue([tmp_path], "onnxruntime", 1)


@given(data=st.binary(max_size=200) | st.text(alphabet="0123456789abcdef *\n\\/x#", max_size=200).map(str.encode))
def test_any_file_is_sums_or_told(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "SHA256SUMS").write_bytes(data)
    try:
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (read_sums(folder) or {}).values())
    except SumsError as error:
        assert str(folder / "SHA256SUMS") in str(error)
