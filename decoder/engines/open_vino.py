"""OpenVINO on the CPU, float32 and int8: the fastest where the processor multiplies bytes (VNNI, AMX)."""

from collections import OrderedDict
from functools import cache
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from decoder.engines import Engine
from decoder.model import Model

_GRIDS = 8
"""Picture sizes at one time, each with all its batches; a model for one is up to a third faster than one for all."""


@cache
def _core() -> Any:
    """One for the process, which is never freed.

    Each Core sets its thread's signal stack and puts back the one before when it is freed; freed in another order than
    they were made, they leave one that is gone, and the next signal ends the process.
    """
    return openvino.Core()


class OpenVinoEngine(Engine):
    """A model, compiled for each size and batch as it comes."""

    def __init__(self, name: str, model: Model, threads: int) -> None:
        super().__init__(name, model, threads)
        self._core = _core()
        self._network = self._core.read_model(model.content)
        self.device = str(self._core.get_property("CPU", "FULL_DEVICE_NAME"))
        self._compiled: OrderedDict[tuple[int, ...], dict[int, Any]] = OrderedDict()

    def _run(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        request = self._request(measurements.shape)
        request.infer({0: measurements})
        return np.array(request.get_output_tensor(0).data)

    def _request(self, shape: tuple[int, ...]) -> Any:
        count, _, *grid = shape
        batches = self._compiled.setdefault(tuple(grid), {})
        self._compiled.move_to_end(tuple(grid))
        if len(self._compiled) > _GRIDS:
            self._compiled.popitem(last=False)
        if count not in batches:
            self._network.reshape({0: list(shape)})
            # Left alone, it takes bfloat16 where the processor has it, which is slower here and not what was measured.
            hints = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": self.threads,
            }
            batches[count] = self._core.compile_model(self._network, "CPU", hints).create_infer_request()
        return batches[count]
