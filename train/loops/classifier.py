"""Train a classifier of small gray pictures by cross-entropy: what a veil is trained against, or judged by."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from train.data.small import WHITE, Batches, Pictures, SmallSet, moved, padded
from train.devices import Device
from train.loops.schedule import Report, Training, descend, learning_rate
from train.models import recognition
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
    graphed = device.graphed(net)
    with Training(run, {"net": net, "optimiser": optimiser}, generator, out, report, device) as training:
        net.train()
        while training.running:
            picture, label = batches.at(training.iteration)
            seen = padded(moved(picture, generator, mirror=run.data == "cifar10"))
            with device.precision():
                scores = graphed(seen.contiguous(memory_format=torch.channels_last)).float()
            loss = functional.cross_entropy(scores, label)
            rate = learning_rate(training.iteration, run)
            descend(optimiser, loss, rate)
            read = (scores.argmax(1) == label).float().mean()
            training.advance({"cross_entropy": loss, "recognition": read}, rate)
    return training.finish(net, recognition=recognition(net.eval(), data.test, device))


def optimiser_of(run: ClassifierRun, net: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that a run names."""
    if run.optimiser == "adamw":
        return torch.optim.AdamW(net.parameters(), run.learning_rate, weight_decay=run.weight_decay)
    return torch.optim.SGD(
        net.parameters(), run.learning_rate, momentum=0.9, weight_decay=run.weight_decay, nesterov=True
    )


def _with_statistics(net: Classifier, pictures: Pictures) -> Classifier:
    values = pictures.x[:5000].float() / WHITE
    net.mean.copy_(values.mean())
    net.deviation.copy_(values.std())
    return net
