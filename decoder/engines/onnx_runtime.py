"""ONNX Runtime, float32 and int8; on an NVIDIA GPU where its CUDA provider is installed, else on the CPU.

Use this where nothing else is: wheels for x86-64 and Arm.
"""

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from decoder.engines import Engine
from decoder.model import Model

_WANTED = ("CUDAExecutionProvider", "CPUExecutionProvider")


class OnnxRuntimeEngine(Engine):
    """One inference session."""

    def __init__(self, name: str, model: Model, threads: int) -> None:
        super().__init__(name, model, threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Idle threads that spin would take the cores that the encoder or the JPEG of the last picture needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = [each for each in _WANTED if each in onnxruntime.get_available_providers()]
        self._session = onnxruntime.InferenceSession(model.content, options, providers=providers)
        # A provider that is installed and doesn't work is left out without a word: ask what it came to.
        self.device = ", ".join(self._session.get_providers())
        self._input, self._output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name

    def _run(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        (pictures,) = self._session.run([self._output], {self._input: measurements})
        return np.asarray(pictures)
