"""A reconstructor's ONNX file, read and checked before any engine has it."""

import base64
import hashlib
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from decoder.sums import SumsError, check_sum

FORMAT_VERSION = "1"
RENDITIONS = ("veiled", "plain")
PRECISIONS = ("float32", "int8", "int8-symmetric")
_MOST_SAMPLED = 1 << 22


class ModelError(Exception):
    """A file that is no reconstructor; the message names it and what was expected."""


@dataclass(frozen=True, eq=False)
class Model:
    """One form of a reconstructor.

    Attributes:
        id: 16 hexadecimal digits of the SHA-256 of the file.
        told: its metadata, without the prefix ``veilcam.``.
        rows: measurements a block that it takes.
        block: side of a block in pixels.
        content: of the file, so that an engine runs what was checked, also when it is rebuilt later.
    """

    path: Path
    id: str
    told: dict[str, str]
    rows: int
    block: int
    content: bytes = field(repr=False)

    @property
    def precision(self) -> str:
        """One of ``PRECISIONS``."""
        return self.told.get("precision", "float32")

    @property
    def of(self) -> str:
        """Id of the float32 file that this one is another form of; its own if it is that file."""
        return self.told.get("of", self.id)

    def sample(self) -> tuple[NDArray[np.int8], float] | None:
        """Measurements (N, m, H/B, W/B) that came with it, and what PSNR to the reference is expected of them, dB."""
        if "sample" not in self.told:
            return None
        try:
            shape, _, packed = self.told["sample"].partition(":")
            sides = tuple(int(side) for side in shape.split("x"))
            if len(sides) != 4 or min(sides) < 1 or sides[1] != self.rows:
                raise ValueError(f"{shape!r}, expected (N, {self.rows}, H/B, W/B)")
            data = zlib.decompressobj().decompress(base64.b85decode(packed), _MOST_SAMPLED)
            return np.frombuffer(data, np.int8).reshape(sides), float(self.told["sample_psnr"])
        except (ValueError, KeyError, zlib.error) as error:
            raise ModelError(f"{self.path}: metadata veilcam.sample can't be read ({error})") from None


def read_model(path: Path) -> Model:
    """Read and check a file.

    Raises:
        ModelError: it can't be read, isn't the file that a SHA256SUMS beside it names, or isn't a reconstructor.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror})") from None
    try:
        check_sum(path, content)
    except SumsError as error:
        raise ModelError(str(error)) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its own classes are private, and any of them means the same here
        raise ModelError(f"{path}: not a model that onnxruntime runs ({str(error).splitlines()[0]})") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != "tensor(int8)" or len(inputs[0].shape) != 4:
        raise ModelError(f"{path}: not a reconstructor (one int8 input of 4 dimensions and one output expected)")
    metadata = session.get_modelmeta().custom_metadata_map
    told = {key.removeprefix("veilcam."): value for key, value in metadata.items() if key.startswith("veilcam.")}
    if told.get("format") != FORMAT_VERSION:
        raise ModelError(f"{path}: metadata veilcam.format is {told.get('format')}, expected {FORMAT_VERSION}")
    if told.get("rendition") not in RENDITIONS or not told.get("operator_id"):
        raise ModelError(f"{path}: metadata veilcam.rendition and veilcam.operator_id: expected both")
    rows, block = inputs[0].shape[1], told.get("block", "")
    if not isinstance(rows, int) or rows < 1 or not block.isdecimal() or int(block) < 2:
        raise ModelError(f"{path}: metadata veilcam.block, and a fixed number of rows: expected both")
    if told.get("precision", "float32") not in PRECISIONS:
        raise ModelError(f"{path}: metadata veilcam.precision: expected one of {', '.join(PRECISIONS)}")
    return Model(path, hashlib.sha256(content).hexdigest()[:16], told, rows, int(block), content)
