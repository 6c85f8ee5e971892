"""Finished networks of CIFAR-10 and MNIST, frozen and in evaluation mode, and what they make of pictures."""

import fcntl
import hashlib
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.optimization import fuse

from train import checkpoint, devices, purifiers
from train.data.small import Pictures, cropped, padded
from train.devices import Device, exactly
from train.networks.classifiers import CLASSIFIERS
from train.networks.classifiers.classifier import Classifier
from train.networks.csnet import CSNet
from train.networks.refinement import Refinement
from train.networks.steps import Steps
from train.settings import MODEL_KINDS, ClassifierRun, CSNetRun, RefinedRun, RetrainedRun, StepsRun

log = logging.getLogger("veilcam.train")

_BATCH = {"cpu": 100, "cuda": 1000}
"""Pictures that are looked at together when measuring, by kind of device; of a CPU as many as its caches like."""


def classifier_of(path: Path, device: Device) -> tuple[Classifier, dict[str, Any]]:
    """A finished classifier, and the checkpoint it came from.

    Raises:
        CheckpointError: not there, not a finished classifier, or the weights of another architecture.
    """
    return _classifier(path, device, ClassifierRun.kind)


def retrained_of(path: Path, device: Device) -> tuple[Classifier, dict[str, Any]]:
    """As ``classifier_of``, one that learned to read a model's pictures; its ``network`` is the checkpoint's own."""
    return _classifier(path, device, RetrainedRun.kind)


def reader_of(path: Path, device: Device) -> tuple[Classifier, dict[str, Any]]:
    """As ``classifier_of``, for one that is only looked through: its batch normalisations folded into its convolutions.

    The same answers and gradients up to rounding, in three quarters of the time for ResNet-110 on a CPU. It can't be
    trained any further.

    Raises:
        CheckpointError: as ``classifier_of`` has it.
    """
    net, state = classifier_of(path, device)
    net.first, net.second = fuse(net.first), fuse(net.second)
    return device.placed(net.eval().requires_grad_(False)), state


def csnet_of(path: Path, device: Device) -> CSNet:
    """The S and G of a finished CSNet, of equation (5) alone."""
    return _model(path, device, (CSNetRun.kind,))[0]


def refined_of(path: Path, device: Device) -> tuple[CSNet, dict[str, Any]]:
    """A finished CSNet with its refinement, and the checkpoint it came from."""
    return _model(path, device, (RefinedRun.kind,))


def model_of(path: Path, device: Device) -> CSNet:
    """The S and G of any finished model."""
    return _model(path, device, MODEL_KINDS)[0]


@torch.no_grad()
def pictures_of(model: CSNet, originals: Pictures, device: Device) -> Pictures:
    """What a model makes of pictures, clipped and rounded to 8 bits as a viewer gets it, with their labels.

    In float32 on every device, as exported models run.
    """
    made, batch = [], _BATCH[device.torch.type]
    with exactly():
        for start in range(0, len(originals), batch):
            picture = originals[start : start + batch].to(device.torch).all()[0]
            reconstruction = model(padded(picture).contiguous(memory_format=torch.channels_last))
            made.append((cropped(reconstruction, picture) * 255).round().clamp(0, 255).to(torch.uint8).cpu())
    return Pictures(torch.cat(made), originals.y.cpu())


def made_by(path: Path, originals: Pictures, device: Device) -> Pictures:
    """As ``pictures_of``, of a finished model's checkpoint; kept beside it for whoever asks next.

    Where a decoder takes steps, 50,000 pictures are an hour on two cores: a kill leaves what was made, and who asks
    for the same ones meanwhile waits for them. Other weights, originals, code of networks or kinds of device make
    others.

    Raises:
        CheckpointError: not a finished model.
        OSError: they can't be kept there.
    """
    model = model_of(path, device)
    known = [checkpoint.fingerprint(path).encode(), originals.x.numpy().tobytes(), device.torch.type.encode()]
    kept = path.parent / f"pictures-{hashlib.sha256(b''.join((*known, *_code()))).hexdigest()[:16]}.u8"
    batch, size = _BATCH[device.torch.type], originals.x[0].numel()
    with kept.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waits for the pictures that another makes by %s", path.parent.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        there = kept.stat().st_size
        if there != originals.x.numel():
            start = min(there // size, len(originals)) // batch * batch
            file.truncate(start * size)
            log.info("%s makes %d pictures", path.parent.name, len(originals) - start)
            for place in range(start, len(originals), batch):
                file.write(pictures_of(model, originals[place : place + batch], device).x.numpy().tobytes())
                file.flush()
            os.fsync(file.fileno())
    pixels = np.fromfile(kept, np.uint8).reshape(originals.x.shape)
    return Pictures(torch.from_numpy(pixels), originals.y)


def _code() -> list[bytes]:
    """Of what makes pictures."""
    here = Path(__file__)
    files = *sorted((here.parent / "networks").rglob("*.py")), Path(purifiers.__file__), Path(devices.__file__), here
    return [file.read_bytes() for file in files]


@torch.no_grad()
def answers(net: Classifier, pictures: Pictures, device: Device) -> Tensor:
    """What a classifier in evaluation mode takes pictures for: classes, int64 (N,).

    In float32 on every device: half precision makes ties of answers that are nearly level, as a veil wants them.
    """
    if net.training:
        raise ValueError("a classifier that is measured must be in evaluation mode")
    given, batch = [], _BATCH[device.torch.type]
    with exactly():
        for start in range(0, len(pictures), batch):
            picture, _ = pictures[start : start + batch].to(device.torch).all()
            given.append(net(padded(picture).contiguous(memory_format=torch.channels_last)).argmax(1).cpu())
    return torch.cat(given)


def recognition(net: Classifier, pictures: Pictures, device: Device) -> float:
    """Percent of pictures that a classifier reads rightly, as ``answers`` gives them."""
    return read_rightly(answers(net, pictures, device), pictures.y.cpu())


def read_rightly(answered: Tensor, classes: Tensor) -> float:
    """Percent of answers that are the pictures' classes."""
    return 100 * float((answered == classes).double().mean())


def _classifier(path: Path, device: Device, kind: str) -> tuple[Classifier, dict[str, Any]]:
    state = _finished(path, (kind,))
    network = state.get("network", state["run"].get("network"))
    if network not in CLASSIFIERS:
        raise checkpoint.CheckpointError(f"{path}: network {network!r} is unknown here")
    net = CLASSIFIERS[network]()
    try:
        net.load_state_dict(state["net"])
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"{path}: not the weights of {network} ({error})") from None
    return device.placed(net.eval().requires_grad_(False)), state


def _model(path: Path, device: Device, kinds: tuple[str, ...]) -> tuple[CSNet, dict[str, Any]]:
    state = _finished(path, kinds)
    weights = state["net"]
    try:
        net = CSNet(len(weights["sampling.weight"]))
        if "refinement.rows" in weights:
            net.refinement = Refinement(weights["refinement.rows"], net.reconstruction.block)
        if state["run"]["kind"] == StepsRun.kind:
            guide, *readers = (CLASSIFIERS[network]() for network in (state["guide"], *state["networks"]))
            run = asdict(StepsRun()) | state["run"]
            net.after = Steps(guide, readers, run["steps"], run["through"])
        net.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise checkpoint.CheckpointError(f"{path}: not the weights of a CSNet ({error})") from None
    return device.placed(net.eval().requires_grad_(False)), state


def _finished(path: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    state = checkpoint.load(path)
    kind = state["run"].get("kind")
    if kind not in kinds or "provenance" not in state or "net" not in state:
        raise checkpoint.CheckpointError(f"{path}: of a {kind} run, expected a finished one of {' or '.join(kinds)}")
    return state
