"""Train a classifier of small gray pictures by cross-entropy: what a veil is trained against, or judged by."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from train import checkpoint
from train.data.small import Batches, Pictures, SmallSet, moved, padded
from train.devices import Device
from train.loops.schedule import Report, Training, descend, learning_rate
from train.networks.classifiers import CLASSIFIERS
from train.networks.classifiers.classifier import Classifier
from train.settings import ClassifierRun


def train(run: ClassifierRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    pictures = data.train.to(device.torch)
    net = device.placed(_with_statistics(CLASSIFIERS[run.network](), pictures))
    batches = Batches(pictures, run.batch, run.seed)
    optimiser = optimiser_of(run, net)
    compiled = device.compiled(net)
    with Training(run, {"net": net, "optimiser": optimiser}, generator, out, report) as training:
        net.train()
        while training.running:
            picture, label = batches.at(training.iteration)
            seen = padded(moved(picture, generator, mirror=run.data == "cifar10"))
            with device.precision():
                scores = compiled(seen.contiguous(memory_format=torch.channels_last)).float()
            loss = functional.cross_entropy(scores, label)
            rate = learning_rate(training.iteration, run)
            descend(optimiser, loss, rate)
            read = (scores.argmax(1) == label).float().mean()
            training.advance({"cross_entropy": loss, "recognition": read}, rate)
    return training.finish(net, recognition=recognition(net.eval(), data.test.to(device.torch), device))


def optimiser_of(run: ClassifierRun, net: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that a run names."""
    if run.optimiser == "adamw":
        return torch.optim.AdamW(net.parameters(), run.learning_rate, weight_decay=run.weight_decay)
    return torch.optim.SGD(
        net.parameters(), run.learning_rate, momentum=0.9, weight_decay=run.weight_decay, nesterov=True
    )


@torch.no_grad()
def recognition(net: Classifier, pictures: Pictures, device: Device, batch: int = 250) -> float:
    """Percent of pictures that a classifier in evaluation mode reads rightly."""
    assert not net.training
    right = 0
    for start in range(0, len(pictures), batch):
        picture, label = pictures[start : start + batch].all()
        with device.precision():
            scores = net(padded(picture).contiguous(memory_format=torch.channels_last))
        right += int((scores.argmax(1) == label).sum())
    return 100 * right / len(pictures)


def classifier_of(path: Path, device: Device) -> tuple[Classifier, dict[str, Any]]:
    """A finished classifier, frozen and in evaluation mode, and the checkpoint it came from."""
    state = checkpoint.load(path)
    run = state["run"]
    if run.get("kind") != ClassifierRun.kind or "provenance" not in state:
        raise checkpoint.CheckpointError(f"{path}: expected the final checkpoint of a classifier run")
    net = CLASSIFIERS[run["network"]]()
    try:
        net.load_state_dict(state["net"])
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"{path}: not the weights of {run['network']} ({error})") from None
    return device.placed(net.eval().requires_grad_(False)), state


def _with_statistics(net: Classifier, pictures: Pictures) -> Classifier:
    values = pictures.x[:5000].float() / 255
    net.mean.copy_(values.mean())
    net.deviation.copy_(values.std())
    return net
