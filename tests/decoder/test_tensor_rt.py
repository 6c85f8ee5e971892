"""TensorRT as far as it goes without a GPU: parsing, building ahead of time, the cache. What needs one is marked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoder.catalogue import SHIPPED
from decoder.engines import EngineError, open_engine
from decoder.engines.choice import AGREES_DB
from decoder.engines.tensor_rt import Gpu, build, cached, find_gpu, keep, key_of, load_runtime
from decoder.model import read_model

GPU = Gpu("a GPU", (8, 6))


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


@pytest.mark.skipif(there_is_a_gpu(), reason="there is a GPU here")
def test_without_a_gpu_it_is_said() -> None:
    with pytest.raises(EngineError, match="no NVIDIA GPU here"):
        open_engine("tensorrt", {"float32": read_model(SHIPPED / "veil-r10.onnx")}, 1)


@pytest.mark.parametrize("precision", ["", ".int8-symmetric"])
@pytest.mark.parametrize("capability", ["SM86", "SM120"])
def test_a_reconstructor_is_built_ahead_of_time(rtx: Any, precision: str, capability: str) -> None:
    built = build(rtx, read_model(SHIPPED / f"veil-r10{precision}.onnx"), capability)
    assert len(built) > 500_000


def test_what_it_cannot_parse_is_told_in_its_own_words(rtx: Any) -> None:
    """Activations that aren't around zero, which CPUs like best and TensorRT doesn't take."""
    with pytest.raises(EngineError, match=r"veil-r10\.int8\.onnx: TensorRT can't parse it \(.*DequantizeLinear"):
        build(rtx, read_model(SHIPPED / "veil-r10.int8.onnx"), "SM86")


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


def test_another_gpu_model_or_runtime_is_another_engine() -> None:
    class Runtime:
        __name__, __version__ = "tensorrt", "10.9"

    class Newer(Runtime):
        __version__ = "10.10"

    model, other = (read_model(SHIPPED / f"{name}.onnx") for name in ("veil-r10", "veil-r10.int8-symmetric"))
    keys = {
        key_of(model, GPU, Runtime()),
        key_of(other, GPU, Runtime()),
        key_of(model, Gpu("another", (8, 6)), Runtime()),
        key_of(model, GPU, Newer()),
    }
    assert len(keys) == 4
    assert key_of(model, GPU, Runtime()) in keys


@pytest.mark.gpu
@pytest.mark.skipif(not there_is_a_gpu(), reason="no GPU here")
def test_on_a_gpu_it_agrees_with_the_reference_at_every_size(runtime: Any) -> None:
    forms = {"float32": read_model(SHIPPED / "veil-r10.onnx")}
    ours, reference = (open_engine(name, forms, 2) for name in ("tensorrt", "onnxruntime"))
    draw = np.random.default_rng(0)
    for count, height, width in ((1, 30, 40), (3, 2, 7), (8, 30, 40), (1, 30, 40), (1, 68, 120)):
        levels = draw.laplace(0, 4, (count, 26, height, width)).round().clip(-127, 127).astype(np.int8)
        error = ours.reconstruct(levels).astype(float) - reference.reconstruct(levels)
        assert 10 * np.log10(255**2 / max(1e-9, (error**2).mean())) >= AGREES_DB
