"""From checkpoints to the files that cameras and servers use: the operator (npz) and reconstructors (ONNX)."""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from encoder.sampling import MID_GREY, Operator, finest_steps
from protos.rules import MAX_LEVEL
from train import checkpoint
from train.devices import Device
from train.evaluation.small import EVALUATION
from train.loops.plain import network_of
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
_HALVED_FROM = 1024
"""Weights of fewer values stay in float32."""
_SAMPLED = (1, (4, 4)), (3, (2, 7))
"""What a file is checked with: how many frames, of how many blocks down and across."""


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
    samples: Sequence[Tensor],
) -> None:
    """Write G as ONNX with dynamic batch and size, and check it against torch on the CPU.

    Weights of classifiers that it carries are rounded to float16, kept so, and used in float32.

    Args:
        metadata: written as ``veilcam.KEY``; values that aren't text as JSON.
        samples: measurements that it is checked with, int8 (N, m, H/B, W/B) each.

    Raises:
        ExportError: onnxruntime's pictures differ from torch's by more than one grey level anywhere; or, where steps
            are taken, by two in the root mean square: a value that is rounded up here and down there turns a step,
            and torch's own in float32 and in float64 are up to one apart.
    """
    module = copy.deepcopy(Served(reconstructor)).eval()
    carried = {
        name: weights
        for name, weights in module.named_parameters()
        if name.startswith(_CARRIED) and weights.numel() >= _HALVED_FROM
    }
    for weights in carried.values():
        weights.data = weights.half().float()
    takes_steps = any(isinstance(part, Steps) for part in module.modules())
    if takes_steps:
        log.info("%s: every layer of every step is written, which takes minutes", path)
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
    _halve(model.graph, carried)
    onnx.checker.check_model(model)
    partial = path.with_suffix(".partial")
    onnx.save(model, partial)
    try:
        _check(module, partial, samples, takes_steps)
    except BaseException:
        partial.unlink()
        raise
    partial.replace(path)


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


def _noise(rows: int) -> list[Tensor]:
    """Measurements of no picture, of about the energies that rows have."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn((count, rows, *grid), generator=generator) for count, grid in _SAMPLED]
    energies = torch.linspace(60, 1, rows).reshape(1, rows, 1, 1)
    return [(noise * energies).round().clamp(-MAX_LEVEL, MAX_LEVEL).to(torch.int8) for noise in drawn]


def _sampled(operator: Operator, pictures: Tensor) -> list[Tensor]:
    """Measurements of pictures, uint8 (N, 1, B, B), side by side. The way that steps go is as long as a picture has
    detail, so that noise would be told by what they do to it.
    """
    samples, blocks = [], cycle(pictures[:, 0].numpy())
    for count, (down, across) in _SAMPLED:
        planes = [np.block([[next(blocks) for _ in range(across)] for _ in range(down)]) for _ in range(count)]
        levels = [operator.quantise(operator.sample(plane, operator.rows), (down, across)) for plane in planes]
        samples.append(torch.from_numpy(np.stack(levels)))
    return samples


def _check(module: nn.Module, path: Path, samples: Sequence[Tensor], takes_steps: bool) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for measurements in samples:
        with torch.no_grad():
            ours = module(measurements).numpy().astype(np.int16)
        theirs = session.run(None, {"measurements": measurements.numpy()})[0].astype(np.int16)
        apart = np.abs(ours - theirs).astype(np.float64)
        worst = np.sqrt(np.square(apart).mean()) if takes_steps else apart.max()
        if worst > (2 if takes_steps else 1):
            raise ExportError(f"{path}: onnxruntime and torch differ by {worst:.1f} grey levels")


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
        operator, reconstructors, samples = _small(names, operator_run, runs, learned_from)
    else:
        operator, reconstructors = _photographs(names, operator_run, runs)
        samples = _noise(operator.rows)
    folder.mkdir(parents=True, exist_ok=True)
    for name, reconstructor in reconstructors:
        state = checkpoint.load(runs / name / "final.pt")
        run = state["run"]
        rendition = "veiled" if KINDS[run["kind"]].veils else "plain"
        evaluation = runs / name / EVALUATION
        metadata = {
            "rendition": rendition,
            "operator_id": operator.id,
            "run": run,
            "trained": state["provenance"],
            "veiled_against": _against(run),
            "measured": _evaluation(evaluation) if rendition == "veiled" or evaluation.exists() else {},
        }
        if "strength" in state:  # a veil of photographs that was made weaker or stronger
            metadata["strength"] = state["strength"]
            told = metadata["measured"].get("strength")
            if told != state["strength"]:
                problem = f"measured at strength {told}, expected {state['strength']}"
                raise ExportError(f"{evaluation}: {problem} (veilcam-train evaluate)")
        sent = [measurements[:, : reconstructor.initial.in_channels] for measurements in samples]
        export_reconstructor(reconstructor, folder / f"{name}.onnx", metadata, sent)
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
) -> tuple[Operator, Iterator[tuple[str, Reconstructor | WireReconstruction]], list[Tensor]]:
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

    return operator, each(), _sampled(operator, learned_from)


def _evaluation(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ExportError(
            f"{path}: not there; a veil ships with its measurement (veilcam-train evaluate, or reproduce)"
        )
    evaluation: dict[str, Any] = json.loads(path.read_text())
    return evaluation


def _against(run: Mapping[str, Any]) -> list[str]:
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in run.items() if key != "kind"}
    kind: Callable[..., Run] = KINDS[run["kind"]]
    settings = kind(**plain)
    if isinstance(settings, SmallRun):
        return list(settings.against)
    return list(settings.readers) if isinstance(settings, VeilRun) else []
