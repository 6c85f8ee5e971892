"""Adv-CSNet-C: train the G of a CSNet against one frozen classifier, equations (4) to (6).

picture ─▶ S, frozen ─▶ s ─▶ G ─▶ x' ─┬─▶ distance to the picture, less is better
                                      └─▶ C, frozen ─▶ cross-entropy of the label, more is better
"""

from pathlib import Path

import torch
from torch import Tensor

from train.data.small import Batches, SmallSet, cropped, padded
from train.devices import Device
from train.loops.schedule import Report, Stateful, Training, descend, stepped_rate
from train.models import csnet_of, reader_of
from train.objectives.paper import against_classifier, beta_due
from train.objectives.reconstruction import psnr
from train.settings import AdversarialRun


def train(run: AdversarialRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    net = csnet_of(out.parent / run.extends / "final.pt", device)
    classifier, _ = reader_of(out.parent / run.classifier / "final.pt", device)
    net.reconstruction.requires_grad_(True)
    batches = Batches(data.train.to(device.torch), run.batch, run.seed)
    optimiser = torch.optim.Adam(net.reconstruction.parameters(), lr=run.learning_rate)
    reading = Reading(max(1, round(run.read_over * len(data.train) / run.batch)))
    parts: dict[str, Stateful] = {"net": net, "optimiser": optimiser, "reading": reading}
    graphed, seen_by = device.graphed(net), device.graphed(classifier)
    with Training(run, parts, generator, out, report, device) as training:
        while training.running:
            picture, label = batches.at(training.iteration)
            with device.precision():
                whole = padded(picture).contiguous(memory_format=torch.channels_last)
                reconstruction = cropped(graphed(whole).float(), picture)
                scores = seen_by(padded(reconstruction)).float()
            beta = beta_due(run.beta, run.beta_later, run.read_below, reading.lowest)
            answers = scores.softmax(1) if run.answers == "softmax" else scores
            terms = against_classifier(reconstruction, picture, answers, label, alpha=run.alpha, beta=beta)
            rate = stepped_rate(training.iteration, run)
            descend(optimiser, sum(terms.values(), torch.zeros((), device=device.torch)), rate)
            read = (scores.argmax(1) == label).float().mean()
            reading.note(read)
            told: dict[str, Tensor | float] = {"psnr": psnr(reconstruction.detach(), picture).mean()}
            training.advance(terms | told | {"recognition": read, "beta": beta}, rate)
    return training.finish(net)


class Reading:
    """Training accuracy, and the lowest that it has been.

    Args:
        iterations: over which it is the mean.
    """

    def __init__(self, iterations: int) -> None:
        self.lowest = 1.0
        self._iterations = iterations
        self._sum: torch.Tensor | float = 0.0
        self._count = 0

    def note(self, read: torch.Tensor) -> None:
        """Count the share of a batch that was read rightly."""
        self._sum, self._count = self._sum + read, self._count + 1
        if self._count == self._iterations:
            self.lowest = min(self.lowest, float(self._sum) / self._count)
            self._sum, self._count = 0.0, 0

    def state_dict(self) -> dict[str, float]:
        return {"lowest": self.lowest, "sum": float(self._sum), "count": self._count}

    def load_state_dict(self, state: dict[str, float], /) -> None:
        self.lowest, self._sum, self._count = state["lowest"], state["sum"], int(state["count"])
