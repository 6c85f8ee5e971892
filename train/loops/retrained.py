"""Retrain a reader on a model's labelled pictures (tier T4), until it stops getting better or its iterations end.

Whether it still gets better is seen on the last tenth of the training pictures, which it doesn't learn from here (a
reader that starts from its own weights has seen their originals before). The test pictures are looked at once, at the
end, with the weights that were best.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.data.small import Batches, SmallSet, moved, padded
from train.devices import Device
from train.loops.schedule import Report, Training, descend
from train.models import classifier_of, made_by, recognition
from train.networks.classifiers import CLASSIFIERS
from train.settings import RetrainedRun

_HELD_BACK = 0.1
_LATEST_DROP = 2 / 3
"""Share of the iterations after which the learning rate is lower in any case, as most results come from a low one."""


def train(run: RetrainedRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``.

    The final checkpoint has the best of the weights, and tells ``recognition``, percent of the model's test pictures
    that the retrained reader reads, and of which ``network`` it is.
    """
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    clean, state = classifier_of(out.parent / run.reader / "final.pt", device)
    net = clean
    if run.scratch:
        net = device.placed(CLASSIFIERS[state["run"]["network"]]())
        net.mean.copy_(clean.mean)
        net.deviation.copy_(clean.deviation)
    net.requires_grad_(True)
    model = out.parent / run.model / "final.pt"
    pictures = made_by(model, data.train, device).to(device.torch)
    held = max(1, round(_HELD_BACK * len(pictures)))
    learned_from, looked_at = pictures[: len(pictures) - held], pictures[len(pictures) - held :]
    batches = Batches(learned_from, run.batch, run.seed)
    optimiser = torch.optim.SGD(net.parameters(), run.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rise = Rise(run.patience)
    graphed = device.graphed(net)
    with Training(run, {"net": net, "optimiser": optimiser, "rise": rise}, generator, out, report, device) as training:
        while training.running and not rise.ended:
            picture, label = batches.at(training.iteration)
            seen = padded(moved(picture, generator, mirror=run.data == "cifar10"))
            net.train()
            with device.precision():
                scores = graphed(seen.contiguous(memory_format=torch.channels_last)).float()
            loss = functional.cross_entropy(scores, label)
            if training.iteration >= run.iterations * _LATEST_DROP:
                rise.lower()
            rate = run.learning_rate * 0.1**rise.drops * min(1.0, (training.iteration + 1) / max(1, run.warm_up))
            descend(optimiser, loss, rate)
            told: dict[str, Tensor | float] = {"cross_entropy": loss}
            told |= {"recognition": (scores.argmax(1) == label).float().mean()}
            if (training.iteration + 1) % run.check_every == 0 or training.iteration + 1 == run.iterations:
                rise.note(recognition(net.eval(), looked_at, device), net)
            training.advance(told | {"held_back": rise.latest}, rate)
    net.load_state_dict(rise.weights)
    at_last = recognition(net.eval(), made_by(model, data.test, device), device)
    network = state["run"]["network"]
    return training.finish(net, network=network, recognition=at_last, iterations=training.iteration)


class Rise:
    """Whether accuracy still rises: when it no longer does, the learning rate drops once, and then the run ends."""

    def __init__(self, patience: int) -> None:
        self.latest, self.best, self.since, self.drops = 0.0, -1.0, 0, 0
        self.weights: dict[str, Tensor] = {}
        """Those of the best accuracy so far."""
        self._patience = patience

    @property
    def ended(self) -> bool:
        """It stopped rising at the lower learning rate too."""
        return self.drops > 1

    def note(self, accuracy: float, net: nn.Module) -> None:
        """Take in a new accuracy, and the weights if it is the best."""
        self.latest = accuracy
        self.since = 0 if accuracy > self.best else self.since + 1
        if accuracy > self.best:
            self.best = accuracy
            self.weights = {name: value.detach().clone() for name, value in net.state_dict().items()}
        if self.since >= self._patience:
            self.drops, self.since = self.drops + 1, 0

    def lower(self) -> None:
        """Drop the learning rate now, if it hasn't dropped yet; whether accuracy rises is watched anew."""
        if not self.drops:
            self.drops, self.since = 1, 0

    def state_dict(self) -> dict[str, Any]:
        told = {"latest": self.latest, "best": self.best, "since": self.since, "drops": self.drops}
        return told | {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.latest, self.best, self.weights = state["latest"], state["best"], state["weights"]
        self.since, self.drops = int(state["since"]), int(state["drops"])
