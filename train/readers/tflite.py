"""Google's own quantised MobileNets, run by LiteRT: readers of another training, another framework and int8."""

from pathlib import Path

import torch
from torch import Tensor

from train.readers import ReaderError, looked_at

INSTALL = "pip install ai-edge-litert backports.strenum flatbuffers"


class QuantisedMobileNet:
    """A TensorFlow Lite classifier: uint8 RGB in, 1,001 classes out, of which the first is background."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        if not path.is_file():
            raise ReaderError(f"{path}: no such weights; name the folder that has them with --readers-folder")
        self._interpreter = Interpreter(model_path=str(path))
        self._interpreter.allocate_tensors()
        (self._input,) = self._interpreter.get_input_details()
        self._output = self._interpreter.get_output_details()[0]
        self._side = int(self._input["shape"][1])

    def __call__(self, pictures: Tensor) -> Tensor:
        seen = (looked_at(pictures, self._side).permute(0, 2, 3, 1) * 255).round().clamp(0, 255).to(torch.uint8)
        return torch.stack([self._read(picture) for picture in seen])

    def _read(self, picture: Tensor) -> Tensor:
        self._interpreter.set_tensor(self._input["index"], picture[None].contiguous().numpy())
        self._interpreter.invoke()
        return torch.from_numpy(self._interpreter.get_tensor(self._output["index"])[0, 1:].astype("float32"))


def mobilenet_v2_quantised(folder: Path | None) -> QuantisedMobileNet:
    """MobileNetV2 1.0, 224 pixels."""
    return QuantisedMobileNet((folder or Path()) / "mobilenet_v2_1.0_224_quant.tflite")


def mobilenet_v1_quantised(folder: Path | None) -> QuantisedMobileNet:
    """MobileNetV1 0.75, 192 pixels."""
    return QuantisedMobileNet((folder or Path()) / "mobilenet_v1_0.75_192_quant.tflite")
