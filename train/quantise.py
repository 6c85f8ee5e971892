"""A reconstructor in 8-bit integers: its 3×3 trunk alone, calibrated on the measurements of photographs.

The first and last layers, the linear picture and all sums stay in float32: they carry the picture, and cost little.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from encoder.sampling import Operator
from train.data.labelled import Labelled
from train.data.leaves import dead_leaves
from train.data.photographs import picture_files, read_gray
from train.export import ExportError, packed
from train.networks.quarter import WHITE
from train.objectives.reconstruction import psnr
from train.readers import Reader
from train.settings import StepsRun

if TYPE_CHECKING:
    import onnxruntime

CROP = 256
CALIBRATED_ON = 64
CHECKED_ON = 64
MOST_LOST_DB = 0.1
MOST_READ_MORE = 1.0
"""Percent of pictures, mean of the readers."""
PRECISIONS = ("int8", "int8-symmetric")
"""Activations in 0..255, which CPUs multiply fastest; or around 0, the only ones that TensorRT takes."""
_SAMPLES = 2
_TRUNK_CHANNELS = 16

Sample = tuple[NDArray[np.uint8], NDArray[np.int8]]
"""A picture (H, W) and its quantised measurements (m, H/B, W/B)."""


def quantise(
    path: Path,
    operator: Operator,
    folders: Sequence[Path],
    out: Path,
    precision: str,
    labelled: Sequence[Labelled] = (),
    readers: Mapping[str, Reader] = MappingProxyType({}),
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the integer form of a reconstructor file, if it is as good, and as well veiled.

    Args:
        path: the reconstructor in float32.
        operator: that it was trained for.
        folders: of photographs: some to calibrate on, others to check with.
        out: the file to write.
        precision: one of ``PRECISIONS``.
        labelled: photographs that readers look at, through a veil's both forms.
        readers: by name; a veil needs some.
        progress: called for each picture that the forms are compared on.

    Returns:
        What was measured: pictures, PSNR of both forms, and of one against the other; of a veil, what readers read.

    Raises:
        ExportError: not such a file, another operator's, a layer without weights of its own, too few photographs, more
            than 0.1 dB lost, or a veil that nobody looked at, or of which readers read more than one percent more.
    """
    try:
        model = onnx.load(path)
    except DecodeError:
        raise ExportError(f"{path}: not an ONNX file") from None
    told = {each.key.removeprefix("veilcam."): each.value for each in model.metadata_props}
    if told.get("operator_id") != operator.id or not told.get("rows", "").isdecimal():
        raise ExportError(f"{path}: of operator {told.get('operator_id')}, expected a reconstructor of {operator.id}")
    if f'"kind": "{StepsRun.kind}"' in told.get("run", ""):
        raise ExportError(f"{path}: takes steps along gradients, which don't lead anywhere in integers")
    if told.get("of"):
        raise ExportError(f"{path}: is {told.get('precision')} already, expected the float32 file that it came from")
    veiled = told.get("rendition") == "veiled"
    if veiled and not (labelled and readers):
        raise ExportError(f"{path}: a veil, expected labelled pictures and readers to look whether it stays one")
    rows = int(told["rows"])
    samples, expected = _samples(folders, operator, rows), CALIBRATED_ON + CHECKED_ON
    first = list(islice(samples, expected))
    if len(first) < expected:
        problem = f"{len(first)} photographs of {CROP} pixels and more, expected at least {expected}"
        raise ExportError(f"{', '.join(map(str, folders))}: {problem}")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        partial = Path(folder) / out.name
        _write(model, path, partial, [levels for _, levels in first[:CALIBRATED_ON]], precision)
        # All that there are are checked with, and none of the rest is kept.
        sessions = {form: _session(file) for form, file in {"float32": path, precision: partial}.items()}
        measured = _compared(sessions, chain(first[CALIBRATED_ON:], samples), progress)
        if measured["lost_db"] > MOST_LOST_DB:
            problem = f"{precision} loses {measured['lost_db']:.3f} dB, at most {MOST_LOST_DB} are allowed"
            raise ExportError(f"{path}: {problem}; nothing was written")
        if veiled:
            seen = _recognition(sessions, labelled, readers, operator, rows, progress)
            measured |= {"labelled": len(labelled), "recognition": seen}
            before, after = (mean(table[form] for table in seen.values()) for form in ("float32", precision))
            if after - before > MOST_READ_MORE:
                problem = f"through {precision} readers read {after:.1f} % instead of {before:.1f}"
                raise ExportError(f"{path}: {problem}; nothing was written")
        drawn = [_sampled(dead_leaves(CROP, seed), operator, rows) for seed in range(_SAMPLES)]
        quantised = onnx.load(partial)
        told |= {
            "precision": precision,
            "of": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
            "quantised": json.dumps(measured),
            "sample": packed(np.stack([levels for _, levels in drawn])),
            "sample_psnr": f"{_compared(sessions, drawn)['agreement_db']}",
        }
        onnx.helper.set_model_props(quantised, {f"veilcam.{key}": value for key, value in told.items()})
        onnx.save(quantised, partial)
        partial.replace(out)
    return measured


def _write(
    model: onnx.ModelProto, path: Path, out: Path, measurements: Sequence[NDArray[np.int8]], precision: str
) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(measurements)

        def get_next(self) -> dict[str, NDArray[np.int8]] | None:
            levels = next(self._left, None)
            return None if levels is None else {"measurements": levels[None]}

    weights = {each.name: tuple(each.dims) for each in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type == "Conv"]
    for node in layers:
        if node.input[1] not in weights:
            problem = f"weights {node.input[1]!r} aren't an initializer, so they can't be turned into integers"
            raise ExportError(f"{path}: layer {node.name!r}: {problem}")
    trunk = [node.name for node in layers if _is_trunk(weights[node.input[1]])]
    if not trunk:
        raise ExportError(f"{path}: has no 3×3 layers of {_TRUNK_CHANNELS} channels and more, nothing to quantise")
    symmetric = precision == "int8-symmetric"
    quantize_static(
        path,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        nodes_to_quantize=trunk,
        # By percentiles: the one outlier in a hundred thousand isn't worth the resolution of all others.
        calibrate_method=CalibrationMethod.Percentile,
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not symmetric},
    )


def _is_trunk(shape: tuple[int, ...]) -> bool:
    return shape[2:] == (3, 3) and min(shape[:2]) >= _TRUNK_CHANNELS


def _samples(folders: Sequence[Path], operator: Operator, rows: int) -> Iterator[Sample]:
    """Crops from the middle of photographs, in an order that has nothing to do with their names."""
    files = [file for folder in folders for file in picture_files(folder)]
    for place in np.random.default_rng(0).permutation(len(files)):
        picture = read_gray(files[place])
        if min(picture.shape) >= CROP:
            top, left = ((side - CROP) // 2 for side in picture.shape)
            yield _sampled(np.ascontiguousarray(picture[top : top + CROP, left : left + CROP]), operator, rows)


def _sampled(picture: NDArray[np.uint8], operator: Operator, rows: int) -> Sample:
    grid = (-(-picture.shape[0] // operator.block), -(-picture.shape[1] // operator.block))
    return picture, operator.quantise(operator.sample(picture, rows), grid)


def _session(path: Path) -> "onnxruntime.InferenceSession":
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _compared(
    sessions: "Mapping[str, onnxruntime.InferenceSession]",
    samples: Iterable[Sample],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What the second form loses against the first."""
    rows = []
    for picture, levels in samples:
        ours, theirs = (session.run(None, {"measurements": levels[None]})[0][0] for session in sessions.values())
        seen, changed, original = (torch.tensor(each)[None, None] / WHITE for each in (ours, theirs, picture))
        rows.append([float(psnr(*pair)) for pair in ((seen, original), (changed, original), (changed, seen))])
        progress()
    before, after, agreement = (float(value) for value in np.mean(rows, 0))
    return {
        "pictures": len(rows),
        "psnr_float32": round(before, 3),
        "psnr": round(after, 3),
        "lost_db": round(before - after, 3),
        "agreement_db": round(agreement, 2),
    }


def _recognition(
    sessions: "Mapping[str, onnxruntime.InferenceSession]",
    labelled: Sequence[Labelled],
    readers: Mapping[str, Reader],
    operator: Operator,
    rows: int,
    progress: Callable[[], None],
) -> dict[str, dict[str, float]]:
    """Percent that readers read through each form, from measurements as cameras send them."""
    right = {reader: dict.fromkeys(sessions, 0) for reader in readers}
    for item in labelled:
        picture, levels = _sampled(read_gray(item.path), operator, rows)
        for form, session in sessions.items():
            pixels = session.run(None, {"measurements": levels[None]})[0][:, : picture.shape[0], : picture.shape[1]]
            seen = torch.from_numpy(pixels)[:, None] / WHITE
            for reader, look in readers.items():
                with torch.no_grad():
                    right[reader][form] += int(look(seen).argmax(1)) == item.label
        progress()
    return {
        reader: {form: round(100 * count / len(labelled), 1) for form, count in counts.items()}
        for reader, counts in right.items()
    }
