"""Finished models of CIFAR-10 and MNIST, of whichever kind, and the pictures that they give."""

from pathlib import Path

import torch

from train import checkpoint
from train.data.small import Pictures, cropped, padded
from train.devices import Device
from train.loops.csnet import csnet_of
from train.networks.csnet import CSNet
from train.settings import AdversarialRun, CSNetRun, EnsembleRun, GenerativeRun

MODEL_KINDS = (CSNetRun.kind, AdversarialRun.kind, GenerativeRun.kind, EnsembleRun.kind)

_BATCH = 250


def model_of(path: Path, device: Device) -> CSNet:
    """The S and G of a finished run, frozen and in evaluation mode."""
    kind = checkpoint.load(path)["run"].get("kind")
    if kind not in MODEL_KINDS:
        raise checkpoint.CheckpointError(f"{path}: a {kind} run, expected one of {', '.join(MODEL_KINDS)}")
    return csnet_of(path, device, kind)[0]


@torch.no_grad()
def pictures_of(model: CSNet, originals: Pictures, device: Device) -> Pictures:
    """What a model makes of pictures, clipped and rounded to 8 bits as a viewer gets it, with their labels."""
    made = []
    for start in range(0, len(originals), _BATCH):
        picture = originals[start : start + _BATCH].to(device.torch).all()[0]
        with device.precision():
            reconstruction = model(padded(picture).contiguous(memory_format=torch.channels_last))
        made.append((cropped(reconstruction.float(), picture) * 255).round().clamp(0, 255).to(torch.uint8).cpu())
    return Pictures(torch.cat(made), originals.y.cpu())
