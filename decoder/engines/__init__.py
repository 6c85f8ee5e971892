"""What runs a reconstructor: one file per runtime, and the table that picks one.

An engine opens a reconstructor's ONNX file and turns measurements into pictures. The public call checks; what is the
runtime's own is ``_run``.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from decoder.model import Model


@dataclass(frozen=True)
class Kind:
    """A runtime with the forms of a reconstructor's files that it takes, the one that it runs fastest first."""

    place: str
    precisions: tuple[str, ...]
    extra: str


ENGINES = {
    "onnxruntime": Kind("decoder.engines.onnx_runtime:OnnxRuntimeEngine", ("float32",), "decoder"),
    "onnxruntime-int8": Kind("decoder.engines.onnx_runtime:OnnxRuntimeEngine", ("int8",), "decoder"),
    "openvino": Kind("decoder.engines.open_vino:OpenVinoEngine", ("float32",), "openvino"),
    "openvino-int8": Kind("decoder.engines.open_vino:OpenVinoEngine", ("int8-symmetric", "int8"), "openvino"),
    "tensorrt": Kind("decoder.engines.tensor_rt:TensorRtEngine", ("float32",), "tensorrt"),
    "tensorrt-float16": Kind("decoder.engines.tensor_rt:TensorRtHalfEngine", ("float32",), "tensorrt"),
    "tensorrt-int8": Kind("decoder.engines.tensor_rt:TensorRtEngine", ("int8-symmetric",), "tensorrt"),
}
"""Name → what it is. Imported when it is chosen."""
REFERENCE = "onnxruntime"
"""What all others must agree with."""


class EngineError(Exception):
    """A runtime that isn't there, a file that it can't run, or a run that failed; the message says what to do."""


class Engine(ABC):
    """A reconstructor, ready to run.

    Args:
        name: in ``ENGINES``.
        model: that it runs.
        threads: that it may use.

    Attributes:
        name, model, threads: as given.
        device: what it really runs on, as the runtime says.
        precision: in which it runs; the model's, unless it makes another form of it.
        most_at_once: pictures in one call.
        most_blocks: of a picture, down or across.
    """

    device: str
    most_at_once = most_blocks = 1 << 16

    def __init__(self, name: str, model: Model, threads: int) -> None:
        self.name, self.model, self.threads, self.precision = name, model, threads, model.precision

    @property
    def rows(self) -> int:
        """Measurements a block that the file takes."""
        return self.model.rows

    @property
    def block(self) -> int:
        """Side of a block in pixels."""
        return self.model.block

    def reconstruct(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        """Pictures (N, H, W) uint8 from quantised measurements (N, m, H/B, W/B) int8.

        Raises:
            ValueError: another type or shape than the reconstructor takes.
            EngineError: the runtime fails, or gives another type or shape back.
        """
        count, rows, height, width = measurements.shape
        if count > self.most_at_once or max(height, width) > self.most_blocks:
            limits = f"at most {self.most_at_once} at once and {self.most_blocks} blocks a side"
            raise ValueError(f"measurements {measurements.shape}: {self.name} takes {limits}")
        if measurements.dtype != np.int8 or rows != self.rows:
            raise ValueError(
                f"measurements {measurements.dtype} {measurements.shape}: expected int8 (N, {self.rows}, …)"
            )
        try:
            pictures = self._run(measurements)
        except Exception as error:
            raise _failed(self.name, self.model, error) from error
        expected = (count, height * self.block, width * self.block)
        if pictures.dtype != np.uint8 or pictures.shape != expected:
            raise EngineError(f"{self.name} gave {pictures.dtype} {pictures.shape}, expected uint8 {expected}")
        return pictures

    def timed(self, count: int, grid: tuple[int, int]) -> float:
        """Milliseconds of one batch.

        Args:
            count: pictures in it.
            grid: blocks of a picture, down and across.
        """
        measurements = np.zeros((count, self.rows, *grid), np.int8)
        began = time.perf_counter()
        self.reconstruct(measurements)
        return (time.perf_counter() - began) * 1e3

    def reopened(self) -> "Engine":
        """The same file in the same runtime, built anew.

        Raises:
            EngineError: that doesn't work.
        """
        return open_engine(self.name, {self.model.precision: self.model}, self.threads)

    @abstractmethod
    def _run(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]: ...


def open_engine(name: str, forms: Mapping[str, Model], threads: int) -> Engine:
    """Open a reconstructor with a runtime.

    Args:
        name: in ``ENGINES``.
        forms: of the reconstructor, by precision.
        threads: that it may use.

    Raises:
        EngineError: unknown or missing runtime, no file of a precision that it runs, or a file that it can't run.
    """
    if name not in ENGINES:
        raise EngineError(f"engine {name!r}: expected one of auto, {', '.join(ENGINES)}")
    kind = ENGINES[name]
    model = next((forms[precision] for precision in kind.precisions if precision in forms), None)
    if model is None:
        path = next(iter(forms.values())).path
        missing = " or ".join(kind.precisions)
        raise EngineError(f"engine {name}: {path} has no {missing} form (veilcam-train quantise makes one)")
    module, attribute = kind.place.split(":")
    try:
        opened: Engine = getattr(import_module(module), attribute)(name, model, threads)
    except EngineError:
        raise
    except ImportError as error:
        raise EngineError(f"engine {name}: {error}; install it with pip install 'veilcam[{kind.extra}]'") from None
    except Exception as error:
        raise _failed(name, model, error) from error
    return opened


def _failed(name: str, model: Model, error: Exception) -> EngineError:
    """A runtime's own exception, whose class no caller knows, in one line."""
    line = next(iter(str(error).strip().splitlines()), "it doesn't say why")
    return EngineError(f"engine {name}: {model.path}: fails ({type(error).__name__}: {line})")
