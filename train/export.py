"""From checkpoints to the files that cameras and servers use: the operator (npz) and reconstructors (ONNX)."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from encoder.sampling import Operator
from protos.rules import MAX_LEVEL
from train import checkpoint
from train.loops.plain import network_of
from train.loops.veil import reconstructor_of
from train.networks.quarter import WHITE, QuarterCSNet, Reconstructor

FORMAT_VERSION = "1"
"""Of the reconstructor file: what decoder.catalogue reads."""
OPSET = 18


class ExportError(ValueError):
    """Networks that can't become files, or a file that doesn't do what its network does."""


class WireReconstructor(nn.Module):
    """G as a server runs it: int8 measurements (N, m, H/B, W/B) → uint8 pictures (N, H, W)."""

    def __init__(self, reconstructor: Reconstructor) -> None:
        super().__init__()
        self.reconstructor = reconstructor

    def forward(self, measurements: Tensor) -> Tensor:
        picture: Tensor = self.reconstructor(measurements.to(torch.float32))
        return (picture[:, 0] * WHITE).clamp(0.0, WHITE).round().to(torch.uint8)


def operator_of(net: QuarterCSNet) -> Operator:
    """Φ and its quantiser as a camera uses them."""
    phi = net.sampling.phi().detach().double().numpy().astype(np.float32)
    steps = net.sampling.steps().double().numpy().astype(np.float32)
    return Operator(phi, steps, net.sampling.block)


def export_reconstructor(reconstructor: Reconstructor, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write G as ONNX with dynamic batch and size, and check it against torch on the CPU.

    Args:
        metadata: written as ``veilcam.KEY``; values that aren't text as JSON.

    Raises:
        ExportError: onnxruntime's pictures differ from torch's by more than one grey level anywhere.
    """
    module = WireReconstructor(reconstructor).eval()
    rows = reconstructor.initial.in_channels
    example = torch.zeros(2, rows, 3, 5, dtype=torch.int8)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("block_rows"), 3: torch.export.Dim("block_columns")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(sizes,),
            input_names=["measurements"],
            output_names=["pictures"],
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.metadata_props[:]
    told = {"format": FORMAT_VERSION, "block": reconstructor.block, "rows": rows, **metadata}
    onnx.helper.set_model_props(
        model, {f"veilcam.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
    )
    onnx.checker.check_model(model)
    partial = path.with_suffix(".partial")
    onnx.save(model, partial)
    try:
        _check(module, partial, rows)
    except BaseException:
        partial.unlink()
        raise
    partial.replace(path)


def _check(module: nn.Module, path: Path, rows: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, rows, 4, 4), (3, rows, 2, 7)):
        noise = torch.randn(shape, generator=generator) * torch.linspace(60, 1, rows).reshape(1, rows, 1, 1)
        measurements = noise.round().clamp(-MAX_LEVEL, MAX_LEVEL).to(torch.int8)
        with torch.no_grad():
            ours = module(measurements).numpy().astype(np.int16)
        theirs = session.run(None, {"measurements": measurements.numpy()})[0].astype(np.int16)
        worst = int(np.abs(ours - theirs).max())
        if worst > 1:
            raise ExportError(f"{path}: onnxruntime and torch differ by {worst} grey levels")


def export_runs(
    names: Sequence[str], operator_run: str, runs: Path, operator_path: Path, folder: Path
) -> Iterator[Path]:
    """Export the operator of one plain run, and reconstructors of plain and veil runs whose Φ is a prefix of it.

    Args:
        runs: where the runs lie, a folder each, with ``final.pt`` and, of a veil run, ``evaluation.json``.

    Yields:
        Each path written, the operator's last, so that a failure on the way leaves the old operator.
    """
    operator = operator_of(network_of(runs / operator_run / "final.pt")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = runs / name / "final.pt"
        state = checkpoint.load(path)
        if state["run"]["kind"] == "plain":
            base, _ = network_of(path)
            reconstructor, rendition, measured = base.reconstructor, "plain", {}
        else:
            base, _ = network_of(runs / state["run"]["extends"] / "final.pt")
            reconstructor, _ = reconstructor_of(path, runs)
            rendition, measured = "veiled", _evaluation(runs / name / "evaluation.json")
        own = operator_of(base)
        if own.rows > operator.rows or not np.array_equal(own.phi, operator.phi[: own.rows]):
            raise ExportError(f"{name}: its Φ isn't the first {own.rows} rows of that of {operator_run}")
        metadata = {
            "rendition": rendition,
            "operator_id": operator.id,
            "run": state["run"],
            "trained": state["provenance"],
            "veiled_against": state["run"].get("readers", []),
            "measured": measured,
        }
        export_reconstructor(reconstructor, folder / f"{name}.onnx", metadata)
        yield folder / f"{name}.onnx"
    operator_path.parent.mkdir(parents=True, exist_ok=True)
    operator.save(operator_path)
    yield operator_path


def _evaluation(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ExportError(f"{path}: not there; a veil ships with its measurement (veilcam-train evaluate)")
    evaluation: dict[str, Any] = json.loads(path.read_text())
    return evaluation
