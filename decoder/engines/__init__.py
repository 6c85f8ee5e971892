"""What runs a reconstructor: one file per runtime, and the table that picks one.

An engine opens a reconstructor's ONNX file and turns measurements into pictures. The public call checks; what is the
runtime's own is ``_run``.
"""

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ENGINES = {"onnxruntime": "decoder.engines.onnx_runtime:OnnxRuntimeEngine"}
"""Name → where its class stands. Imported when it is chosen."""


class EngineError(Exception):
    """A runtime that isn't there, or a file that it can't run; the message says what to do."""


class Engine(ABC):
    """A reconstructor, ready to run.

    Args:
        path: of its ONNX file.
        threads: that it may use.

    Raises:
        EngineError: a file that the runtime can't run.

    Attributes:
        name: of the runtime, as in ``ENGINES``.
        device: what it really runs on, as the runtime says.
        path, threads: as given.
        metadata: of the ONNX file.
        rows: measurements a block that the file takes.
        block: side of a block in pixels.
    """

    name: str
    device: str
    metadata: dict[str, str]
    rows: int
    block: int

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads

    def reconstruct(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        """Pictures (N, H, W) uint8 from quantised measurements (N, m, H/B, W/B) int8.

        Raises:
            ValueError: another type or shape than the reconstructor takes, or than it gave back.
        """
        count, rows, height, width = measurements.shape
        if measurements.dtype != np.int8 or rows != self.rows:
            raise ValueError(
                f"measurements {measurements.dtype} {measurements.shape}: expected int8 (N, {self.rows}, …)"
            )
        pictures = self._run(measurements)
        expected = (count, height * self.block, width * self.block)
        if pictures.dtype != np.uint8 or pictures.shape != expected:
            raise ValueError(f"{self.name} gave {pictures.dtype} {pictures.shape}, expected uint8 {expected}")
        return pictures

    def reopened(self) -> "Engine":
        """The same file in the same runtime, built anew.

        Raises:
            EngineError: that doesn't work.
        """
        return type(self)(self.path, self.threads)

    @abstractmethod
    def _run(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]: ...


def open_engine(name: str, path: Path, threads: int) -> Engine:
    """Open a reconstructor with a runtime.

    Raises:
        EngineError: unknown or missing runtime, or a file that it can't run.
    """
    if name not in ENGINES:
        raise EngineError(f"engine {name!r}: expected one of {', '.join(ENGINES)}")
    module, attribute = ENGINES[name].split(":")
    try:
        engine = getattr(import_module(module), attribute)
    except ImportError as error:
        raise EngineError(f"engine {name}: {error}; install it with pip install 'veilcam[decoder]'") from None
    opened: Engine = engine(path, threads)
    return opened
