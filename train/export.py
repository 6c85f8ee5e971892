"""From checkpoints to the files that cameras and servers use: the operator (npz) and reconstructors (ONNX)."""

import base64
import copy
import json
import logging
import math
import warnings
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoder.sampling import MID_GREY, Operator, finest_steps
from protos.rules import MAX_LEVEL
from train import checkpoint
from train.devices import Device
from train.evaluation.small import EVALUATION
from train.loops.plain import network_of
from train.loops.schedule import replaced
from train.loops.veil import reconstructor_of
from train.models import model_of
from train.networks import phi
from train.networks.csnet import CSNet, WireReconstruction
from train.networks.quarter import WHITE, QuarterCSNet, Reconstructor
from train.networks.steps import Steps
from train.settings import KINDS, MODEL_KINDS, PlainRun, Run, SmallRun, VeilRun

log = logging.getLogger("veilcam.train")

FORMAT_VERSION = "1"
"""Of the reconstructor file: what decoder.catalogue reads."""
OPSET = 18
_FINER = 64
_CARRIED = "reconstructor.after.guide.", "reconstructor.after.readers."
"""How names of carried classifiers' weights begin."""
_SIZE = "reconstructor.after.size"
_HALVED_FROM = 1024
"""Weights of fewer values stay in float32."""
_GRIDS = (1, (4, 4)), (3, (2, 7))
"""Of the noise that a file is checked with: how many frames, of how many blocks down and across."""
_SAMPLED = (4, 4)
"""Blocks down and across of the pictures that steps are checked with."""
_STRAYED = 0.3
"""Of the way that steps go, how far an engine may end from where torch does, root mean square: a value that is rounded
up here and down there turns a step. Torch's own in float32 and in float64 end up to 0.2 of it apart."""


class ExportError(ValueError):
    """Networks that can't become files, or a file that doesn't do what its network does."""


class Served(nn.Module):
    """G as a server runs it: int8 measurements (N, m, H/B, W/B) → uint8 pictures (N, H, W)."""

    def __init__(self, reconstructor: Reconstructor | WireReconstruction) -> None:
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


def export_reconstructor(
    reconstructor: Reconstructor | WireReconstruction,
    path: Path,
    metadata: Mapping[str, Any],
    sample: Tensor | None = None,
) -> None:
    """Write G as ONNX with dynamic batch and size, and check it against torch on the CPU.

    Weights of classifiers that it carries are rounded to float16, kept so, and used in float32. Where steps are taken a
    sample goes with it, and how near an engine must come on that.

    Args:
        metadata: written as ``veilcam.KEY``; values that aren't text as JSON.
        sample: measurements of pictures, int8 (N, m, H/B, W/B), for networks that take steps.

    Raises:
        ExportError: onnxruntime's pictures, before steps, differ from torch's by more than one grey level anywhere; or
            after them by more than ``_STRAYED`` of the way.
    """
    module = copy.deepcopy(Served(reconstructor)).eval()
    carried = {
        name: weights
        for name, weights in module.named_parameters()
        if name.startswith(_CARRIED) and weights.numel() >= _HALVED_FROM
    }
    for weights in carried.values():
        weights.data = weights.half().float()
    rows = reconstructor.initial.in_channels
    told = {"format": FORMAT_VERSION, "block": reconstructor.block, "rows": rows, **metadata}
    still = _without_steps(module)
    if still is not module:
        assert sample is not None, "steps are held against torch on pictures"
        log.info("%s: every layer of every step is written, which takes minutes", path)
        ours = _pictures(module, sample)
        may_stray = _STRAYED * _rms(ours - _pictures(still, sample))
        told |= {"sample": packed(sample.numpy()), "sample_psnr": f"{20 * math.log10(WHITE / may_stray):.1f}"}
    model = _written(module, rows)
    onnx.helper.set_model_props(
        model, {f"veilcam.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
    )
    _halve(model.graph, carried)
    onnx.checker.check_model(model)
    noise = _noise(rows)
    for measurements, theirs in zip(noise, _run(_file_without_steps(model), noise), strict=True):
        apart = np.abs(_pictures(still, measurements) - theirs).max()
        if apart > 1:
            raise ExportError(f"{path}: onnxruntime and torch differ by {apart:.0f} grey levels")
    if sample is not None and still is not module:
        strayed = _rms(ours - _run(model, [sample])[0])
        if strayed > may_stray:
            told_of = f"steps end {strayed:.1f} grey levels from where torch's do, at most {may_stray:.1f} are allowed"
            raise ExportError(f"{path}: onnxruntime's {told_of}")
    partial = path.with_suffix(".partial")
    onnx.save(model, partial)
    partial.replace(path)


def _written(module: nn.Module, rows: int) -> onnx.ModelProto:
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
    return model


def _halve(graph: onnx.GraphProto, names: Container[str]) -> None:
    """Keep weights of these names in float16."""
    casts = []
    for tensor in graph.initializer:
        if tensor.name in names:
            name, half, values = tensor.name, f"{tensor.name}.half", onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), half))
            casts.append(onnx.helper.make_node("Cast", [half], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _without_steps(module: nn.Module) -> nn.Module:
    """The same with steps of no length; itself if it takes none."""
    if not any(isinstance(part, Steps) for part in module.modules()):
        return module
    still = copy.deepcopy(module)
    for part in still.modules():
        if isinstance(part, Steps):
            part.size.zero_()
    return still


def _file_without_steps(model: onnx.ModelProto) -> onnx.ModelProto:
    """As ``_without_steps``, of a file's content."""
    still = onnx.ModelProto()
    still.CopyFrom(model)
    for tensor in still.graph.initializer:
        if tensor.name == _SIZE:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((), np.float32), _SIZE))
    return still


def _noise(rows: int) -> list[Tensor]:
    """Measurements of no picture, of about the energies that rows have."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn((count, rows, *grid), generator=generator) for count, grid in _GRIDS]
    energies = torch.linspace(60, 1, rows).reshape(1, rows, 1, 1)
    return [(noise * energies).round().clamp(-MAX_LEVEL, MAX_LEVEL).to(torch.int8) for noise in drawn]


def _sample(operator: Operator, pictures: Tensor) -> Tensor:
    """Measurements of the first pictures, uint8 (N, 1, B, B), side by side in one frame."""
    blocks, (down, across) = cycle(pictures[:, 0].numpy()), _SAMPLED
    plane = np.block([[next(blocks) for _ in range(across)] for _ in range(down)])
    return torch.from_numpy(operator.quantise(operator.sample(plane, operator.rows), _SAMPLED))[None]


def packed(levels: NDArray[np.int8]) -> str:
    """Shape, then the values, as text: what a server checks its engines with."""
    return f"{'x'.join(map(str, levels.shape))}:{base64.b85encode(zlib.compress(levels.tobytes(), 9)).decode()}"


@torch.no_grad()
def _pictures(module: nn.Module, measurements: Tensor) -> NDArray[np.float64]:
    made: Tensor = module(measurements)
    return made.numpy().astype(np.float64)


def _run(model: onnx.ModelProto, samples: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run(None, {"measurements": each.numpy()})[0].astype(np.float64) for each in samples]


def _rms(apart: NDArray[np.float64]) -> float:
    return math.sqrt(np.square(apart).mean())


def export_runs(
    names: Sequence[str],
    operator_run: str,
    runs: Path,
    operator_path: Path,
    folder: Path,
    learned_from: Tensor | None = None,
) -> Iterator[Path]:
    """Export the operator of one plain run or CSNet, and reconstructors of runs that share its Φ.

    Of plain and veil runs Φ may also be a prefix of the operator's.

    Args:
        runs: where the runs lie, a folder each, with ``final.pt`` and, of a veiled one, ``evaluation.json``.
        learned_from: uint8 (N, 1, 32, 32) that a CSNet learned from; they tell how its measurements are distributed.

    Yields:
        Each path written, the operator's last, so that a failure on the way leaves the old operator.
    """
    reconstructors: Iterator[tuple[str, Reconstructor | WireReconstruction]]
    small = checkpoint.load(runs / operator_run / "final.pt")["run"]["kind"] in MODEL_KINDS
    if small:
        operator, reconstructors = _small(names, operator_run, runs, learned_from)
    else:
        operator, reconstructors = _photographs(names, operator_run, runs)
    sample = None if learned_from is None else _sample(operator, learned_from)
    folder.mkdir(parents=True, exist_ok=True)
    for name, reconstructor in reconstructors:
        state = checkpoint.load(runs / name / "final.pt")
        run = state["run"]
        rendition = "veiled" if KINDS[run["kind"]].veils else "plain"
        metadata = {
            "rendition": rendition,
            "operator_id": operator.id,
            "run": run,
            "trained": state["provenance"],
            "veiled_against": _against(run),
            "measured": _evaluation(runs, name, run.get("extends")),
        }
        if rendition == "veiled" and not metadata["measured"]:
            needed = "a veil ships with its measurement (veilcam-train evaluate, or reproduce)"
            raise ExportError(f"{runs / name / EVALUATION}: not there; {needed}")
        if "strength" in state:  # a veil of photographs that was made weaker or stronger
            metadata["strength"] = state["strength"]
        export_reconstructor(reconstructor, folder / f"{name}.onnx", metadata, sample)
        yield folder / f"{name}.onnx"
    operator_path.parent.mkdir(parents=True, exist_ok=True)
    operator.save(operator_path)
    yield operator_path


def operator_of_csnet(net: CSNet, learned_from: Tensor) -> Operator:
    """What S measures as a camera samples it: orthonormal rows of the same span, by energy, and steps that no picture
    that it learned from saturates.

    Args:
        learned_from: uint8 (N, 1, B, B).
    """
    basis, side = net.span(), net.reconstruction.block
    moment = phi.covariance([learned_from.reshape(-1, side)], side)
    rotation = torch.linalg.eigh(basis @ moment @ basis.T).eigenvectors.flip(1)
    rows = (rotation.T @ basis).float()
    furthest = torch.zeros(len(rows))
    for pictures in torch.split(learned_from.flatten(1), 5000):
        furthest = torch.maximum(furthest, ((pictures.float() - MID_GREY) @ rows.T).abs().amax(0))
    phi_rows = rows.numpy()
    # A direction in which those pictures hardly vary still needs a step that others don't leave by far.
    steps = np.maximum(furthest.numpy() / MAX_LEVEL, finest_steps(phi_rows) / _FINER)
    return Operator(phi_rows, steps, side)


def _photographs(
    names: Sequence[str], operator_run: str, runs: Path
) -> tuple[Operator, Iterator[tuple[str, Reconstructor | WireReconstruction]]]:
    operator = operator_of(network_of(runs / operator_run / "final.pt")[0])

    def each() -> Iterator[tuple[str, Reconstructor | WireReconstruction]]:
        for name in names:
            path = runs / name / "final.pt"
            state = checkpoint.load(path)
            kind = state["run"]["kind"]
            if kind == PlainRun.kind:
                base, _ = network_of(path)
                reconstructor = base.reconstructor
            elif kind != VeilRun.kind:
                raise ExportError(f"{name}: a {kind} run, but {operator_run} is one of photographs")
            else:
                base, _ = network_of(runs / state["run"]["extends"] / "final.pt")
                reconstructor, _ = reconstructor_of(path, runs)
            own = operator_of(base)
            if own.rows > operator.rows or not np.array_equal(own.phi, operator.phi[: own.rows]):
                raise ExportError(f"{name}: its Φ isn't the first {own.rows} rows of that of {operator_run}")
            yield name, reconstructor

    return operator, each()


def _small(
    names: Sequence[str], operator_run: str, runs: Path, learned_from: Tensor | None
) -> tuple[Operator, Iterator[tuple[str, Reconstructor | WireReconstruction]]]:
    state = checkpoint.load(runs / operator_run / "final.pt")
    if state["run"]["data"] != "cifar10" or learned_from is None:
        problem = "only models of CIFAR-10 are exported, with the pictures that they learned from"
        raise ExportError(f"{operator_run}: {problem}; pictures of other sets aren't whole blocks")
    device = Device(torch.device("cpu"), False, "CPU")
    base = model_of(runs / operator_run / "final.pt", device)
    operator = operator_of_csnet(base, learned_from)

    def each() -> Iterator[tuple[str, Reconstructor | WireReconstruction]]:
        for name in names:
            net = model_of(runs / name / "final.pt", device)
            if not torch.equal(net.sampling.weight, base.sampling.weight):
                raise ExportError(f"{name}: its Φ isn't that of {operator_run}")
            rows = torch.from_numpy(operator.phi).double()
            yield name, WireReconstruction(net, rows, torch.from_numpy(operator.steps))

    return operator, each()


def _evaluation(runs: Path, name: str, extends: str | None) -> dict[str, Any]:
    """What was measured of just these weights; nothing if nothing was."""
    path = runs / name / EVALUATION
    if not path.exists():
        return {}
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise ExportError(f"{path}: not a measurement, or damaged") from None
    made_from = told.get("needs", {})
    measured = {run: made_from[run] for run in (name, extends) if run is not None and run in made_from}
    anew = "measure it anew (veilcam-train evaluate, or reproduce)"
    if name not in measured:
        raise ExportError(f"{path}: doesn't say of which weights; {anew}")
    if replaced(runs, measured):
        raise ExportError(f"{path}: measured with other weights than are there now; {anew}")
    return told


def _against(run: Mapping[str, Any]) -> list[str]:
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in run.items() if key != "kind"}
    kind: Callable[..., Run] = KINDS[run["kind"]]
    settings = kind(**plain)
    if isinstance(settings, SmallRun):
        return list(settings.against)
    return list(settings.readers) if isinstance(settings, VeilRun) else []
