"""ONNX Runtime on the CPU, float32. Use this where there is no GPU; wheels for x86-64 and Arm."""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from decoder.engines import Engine, EngineError


class OnnxRuntimeEngine(Engine):
    """One inference session."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(path, threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Idle threads that spin would take the cores that the encoder or the JPEG of the last picture needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - its own classes are private, and any of them means the same here
            raise EngineError(f"{path}: not a model that onnxruntime runs ({str(error).splitlines()[0]})") from None
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != "tensor(int8)" or len(inputs[0].shape) != 4:
            raise EngineError(f"{path}: not a reconstructor (one int8 input of 4 dimensions and one output expected)")
        self.device = ", ".join(self._session.get_providers())
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        self.rows = int(inputs[0].shape[1]) if isinstance(inputs[0].shape[1], int) else 0
        block = self.metadata.get("veilcam.block", "")
        self.block = int(block) if block.isdigit() else 0
        self._input, self._output = inputs[0].name, outputs[0].name

    def _run(self, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        (pictures,) = self._session.run([self._output], {self._input: measurements})
        return np.asarray(pictures)
