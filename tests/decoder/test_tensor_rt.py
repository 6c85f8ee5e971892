"""TensorRT as far as it goes without a GPU: parsing, building ahead of time, the cache, buffers on a pretended one.

What needs one is marked.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.fidelity import psnr
from decoder.catalogue import SHIPPED, load_catalogue, read_forms
from decoder.engines import Engine, EngineError, open_engine, tensor_rt
from decoder.engines.choice import AGREES_DB, agreeing, fastest
from decoder.engines.tensor_rt import Gpu, build, cached, find_gpu, halved, keep, key_of, load_runtime
from decoder.model import Model, read_model
from encoder.sampling import Operator
from tests.conftest import StartService
from tests.decoder.pretend_gpu import Cuda, TensorRt
from tests.waiting import wait_for

GPU = Gpu("a GPU", (8, 6))
NAMES = ("tensorrt", "tensorrt-float16", "tensorrt-int8")
PRECISIONS = ("float32", "float16", "int8-symmetric")


def there_is_a_gpu() -> bool:
    try:
        find_gpu()
    except EngineError:
        return False
    return True


@pytest.fixture(scope="module")
def runtime() -> Any:
    try:
        return load_runtime()
    except ImportError as error:
        pytest.skip(f"pip install 'veilcam[tensorrt-rtx]' ({error})")


@pytest.fixture(scope="module")
def rtx(runtime: Any) -> Any:
    if runtime.__name__ != "tensorrt_rtx":
        pytest.skip("only TensorRT-RTX builds for a GPU that isn't here")
    return runtime


@pytest.fixture(scope="module")
def files() -> dict[str, Model]:
    """A veil in every form that there is a file of."""
    (forms,) = read_forms(sorted(SHIPPED.glob("veil-r10*.onnx")))
    return forms


@pytest.fixture(scope="module")
def forms(files: dict[str, Model]) -> dict[str, Model]:
    """In every form that is built."""
    return files | {"float16": halved(files["float32"])}


def measurements(draw: np.random.Generator, count: int, height: int, width: int) -> NDArray[np.int8]:
    """As a veil with 26 rows takes them."""
    return draw.laplace(0, 4, (count, 26, height, width)).round().clip(-127, 127).astype(np.int8)


@pytest.mark.skipif(there_is_a_gpu(), reason="there is a GPU here")
@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_it_is_said(name: str, files: dict[str, Model]) -> None:
    with pytest.raises(EngineError, match="no NVIDIA GPU here"):
        open_engine(name, files, 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", ["SM75", "SM86", "SM120"])
def test_a_reconstructor_is_built_ahead_of_time(
    rtx: Any, precision: str, capability: str, forms: dict[str, Model]
) -> None:
    built = build(rtx, forms[precision], capability)
    assert len(built) > 500_000
    if precision == "float16":
        assert len(built) < 0.7 * len(build(rtx, forms["float32"], capability))


def test_what_it_cannot_parse_is_told_in_its_own_words(rtx: Any) -> None:
    """Activations that aren't around zero, which CPUs like best and TensorRT doesn't take."""
    with pytest.raises(EngineError, match=r"veil-r10\.int8\.onnx: TensorRT can't parse it \(.*DequantizeLinear"):
        build(rtx, read_model(SHIPPED / "veil-r10.int8.onnx"), "SM86")


@pytest.mark.parametrize("name", ["plain-r10", "plain-r25", "veil-r10"])
def test_float16_gives_the_pictures_of_float32(
    name: str, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """On onnxruntime, of photographs, and of measurements as large as they get: no sum overflows."""
    model = read_model(SHIPPED / f"{name}.onnx")
    half = halved(model)
    assert (half.precision, half.of, half.rows, half.block) == ("float16", model.id, model.rows, model.block)
    assert len(half.content) < 0.7 * len(model.content)
    ours, reference = (open_engine("onnxruntime", {"float32": each}, 1) for each in (half, model))
    sampled = [operator.quantise(operator.sample(each, model.rows), (21, 28))[None] for each in photographs[::3]]
    extreme = np.random.default_rng(0).choice(np.array([-127, 127], np.int8), (1, model.rows, 9, 12))
    for levels in [*sampled, extreme, np.full_like(extreme, 127), np.full_like(extreme, -127)]:
        assert psnr(ours.reconstruct(levels), reference.reconstruct(levels)) >= AGREES_DB


def test_the_cache_gives_back_whole_engines_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "engines"
    assert cached(folder, "key") is None
    keep(folder, "key", b"an engine")
    assert cached(folder, "key") == b"an engine"
    assert [path.name for path in folder.iterdir()] == ["key"]
    whole = (folder / "key").read_bytes()
    for damaged in (b"", whole[:-1], whole[:20], whole.replace(b"engine", b"angina"), b"X" + whole[1:]):
        (folder / "key").write_bytes(damaged)
        caplog.clear()
        assert cached(folder, "key") is None
        assert "key is damaged; the engine is built anew" in caplog.text
    keep(folder, "key", b"another")
    assert cached(folder, "key") == b"another"
    (tmp_path / "file").write_text("in the way")
    caplog.clear()
    keep(tmp_path / "file", "key", b"an engine")
    assert "the engine can't be kept" in caplog.text


def test_another_gpu_model_precision_or_runtime_is_another_engine(forms: dict[str, Model]) -> None:
    class Runtime:
        __name__, __version__ = "tensorrt", "10.9"

    class Newer(Runtime):
        __version__ = "10.10"

    model = forms["float32"]
    keys = {
        *(key_of(forms[precision], GPU, Runtime()) for precision in PRECISIONS),
        key_of(model, Gpu("another", (8, 6)), Runtime()),
        key_of(model, GPU, Newer()),
    }
    assert len(keys) == 5
    assert key_of(model, GPU, Runtime()) in keys
    assert key_of(halved(model), GPU, Runtime()) in keys


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cuda:
    """A pretended GPU, on which building an engine leaves the ONNX file as it is."""
    cuda = Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setattr(tensor_rt, "find_gpu", lambda: GPU)
    monkeypatch.setattr(tensor_rt, "load_runtime", lambda: TensorRt(cuda))
    monkeypatch.setattr(tensor_rt, "build", lambda runtime, model: model.content)
    monkeypatch.setattr(tensor_rt, "CACHE", tmp_path / "engines")
    return cuda


def test_each_precision_is_built_once_and_held_to_the_reference(
    cuda: Cuda, files: dict[str, Model], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def built() -> list[str]:
        caplog.clear()
        engines, tried = agreeing(files, 1)
        assert [engines[name].precision for name in NAMES] == list(PRECISIONS)
        assert all((tried[name].agreement_db or 0) >= AGREES_DB for name in NAMES[:2])
        return [record.getMessage() for record in caplog.records]

    assert built() == [
        "veil-r10.onnx: building in float32 for a GPU, once",
        "veil-r10.onnx: building in float16 for a GPU, once",
        "veil-r10.int8-symmetric.onnx: building in int8-symmetric for a GPU, once",
    ]
    assert built() == []
    half = tensor_rt.CACHE / key_of(halved(files["float32"]), GPU, TensorRt(cuda))
    half.write_bytes(half.read_bytes()[:-1])
    assert built() == [
        f"{half} is damaged; the engine is built anew",
        "veil-r10.onnx: building in float16 for a GPU, once",
    ]
    assert built() == []


def test_an_engine_in_float16_is_rebuilt_from_the_file_that_was_checked(cuda: Cuda, files: dict[str, Model]) -> None:
    again = open_engine("tensorrt-float16", files, 1).reopened()
    assert (again.name, again.precision, again.model) == ("tensorrt-float16", "float16", files["float32"])


def test_each_size_and_batch_has_its_own_memory_and_the_oldest_gives_it_back(
    cuda: Cuda, files: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_rt, "_GRAPHS", 2)
    ours, reference = (open_engine(name, files, 1) for name in ("tensorrt-float16", "onnxruntime"))
    draw = np.random.default_rng(0)
    for sides in ((1, 3, 4), (3, 2, 7), (1, 3, 4), (2, 9, 2), (1, 3, 4), (3, 2, 7)):
        levels = measurements(draw, *sides)
        assert psnr(ours.reconstruct(levels), reference.reconstruct(levels)) >= AGREES_DB
        assert len(cuda.graphs) <= 2
        assert len(cuda.held) == 5 * len(cuda.graphs)


def test_a_batch_without_room_is_told_and_leaves_nothing(cuda: Cuda, files: dict[str, Model]) -> None:
    ours = open_engine("tensorrt", files, 1)
    small, large = (measurements(np.random.default_rng(0), *sides) for sides in ((1, 3, 4), (16, 30, 40)))
    expected = ours.reconstruct(small)
    held = set(cuda.held)
    for room in (1 << 20, 6 << 20, 10 << 20, 12 << 20):
        cuda.room = room
        with pytest.raises(EngineError, match="cudaErrorMemoryAllocation"):
            ours.reconstruct(large)
        assert set(cuda.held) == held
    assert np.array_equal(ours.reconstruct(small), expected)


def test_engines_that_are_let_go_give_everything_back(
    cuda: Cuda, files: dict[str, Model], start_service: StartService
) -> None:
    """One that is rebuilt, those that were tried and aren't taken, and one in whose place another is taken up."""
    levels = measurements(np.random.default_rng(0), 1, 3, 4)
    engine: Engine = open_engine("tensorrt", files, 1)
    engine.reconstruct(levels)
    held = len(cuda.held)
    assert not cuda.recorded
    engine = engine.reopened()
    assert (cuda.held, cuda.graphs, len(cuda.streams)) == ({}, [], 1)
    engine.reconstruct(levels)
    assert len(cuda.held) == held
    del engine
    assert cuda.holds_nothing()

    engine, _ = fastest(files, 1)
    assert len(cuda.streams) == (engine.name in NAMES)
    del engine
    assert cuda.holds_nothing()

    catalogue = load_catalogue([SHIPPED / "veil-r10.onnx"], "tensorrt", 1)
    service = start_service(catalogue=catalogue)
    assert cuda.held
    after = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    service.loop.call_soon_threadsafe(service.server.apply, service.server.settings, after)
    wait_for(cuda.holds_nothing, "a device that holds nothing")


@pytest.mark.gpu
@pytest.mark.skipif(not there_is_a_gpu(), reason="no GPU here")
@pytest.mark.parametrize("name", NAMES[:2])
def test_on_a_gpu_it_agrees_with_the_reference_at_every_size(name: str, runtime: Any, files: dict[str, Model]) -> None:
    ours, reference = (open_engine(each, files, 2) for each in (name, "onnxruntime"))
    draw = np.random.default_rng(0)
    for sides in ((1, 30, 40), (3, 2, 7), (8, 30, 40), (1, 30, 40), (1, 68, 120)):
        levels = measurements(draw, *sides)
        assert psnr(ours.reconstruct(levels), reference.reconstruct(levels)) >= AGREES_DB
