"""Adv-CSNet-E: the G of a CSNet against a set of readers, through purifiers, for a given share of PSNR.

picture ─▶ S, frozen ─▶ s ─┬─▶ G ─▶ x' ─┬─▶ distance to the picture, its weight follows the PSNR that may be lost
                           │            └─▶ half of them purified ─▶ each reader ─▶ answer, features halfway
                           └─▶ G of the CSNet, frozen ─▶ the PSNR to lose from

Readers are frozen surrogates, and some that learn on the veiled pictures, with their labels, beside G.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from train.data.small import Batches, SmallSet, cropped, moved, padded
from train.devices import Device
from train.loops.classifier import classifier_of
from train.loops.csnet import csnet_of
from train.loops.schedule import Report, Training, descend, learning_rate
from train.networks.classifiers.classifier import Classifier
from train.objectives.paper import reconstruction_loss
from train.objectives.reconstruction import psnr
from train.objectives.veil import likeness, uniform, unreadable
from train.purifiers import random_purifier
from train.settings import EnsembleRun, SettingsError

_READER_RATE = 0.01


def train(run: EnsembleRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``."""
    if not run.surrogates:
        raise SettingsError("surrogates: none, expected at least one finished classifier run")
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    base, _ = csnet_of(out.parent / run.extends / "final.pt", device)
    net = copy.deepcopy(base)
    net.reconstruction.requires_grad_(True)
    surrogates = {name: classifier_of(out.parent / name / "final.pt", device)[0] for name in run.surrogates}
    batches = Batches(data.train.to(device.torch), run.batch, run.seed)
    optimiser = torch.optim.Adam(net.reconstruction.parameters(), lr=run.learning_rate)
    weight = FidelityWeight(run.psnr_lost)
    learning = [LearningReader(surrogates, index) for index in range(run.learning_readers)]
    parts: dict[str, Any] = {"net": net, "optimiser": optimiser, "weight": weight}
    parts |= {f"reader_{index}": reader for index, reader in enumerate(learning)}
    with Training(run, parts, generator, out, report) as training:
        while training.running:
            picture, label = batches.at(training.iteration)
            whole = padded(picture).contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), device.precision():
                measurements = base.sampling(whole)
                plain = cropped(base.reconstruction(measurements).float(), picture)
            with device.precision():
                veiled = cropped(net.reconstruction(measurements).float(), picture)
            readers = surrogates | {f"learning_{index}": reader.net for index, reader in enumerate(learning)}
            lost = 1 - psnr(veiled.detach(), picture).mean() / psnr(plain, picture).mean()
            terms = {"reconstruction": weight.alpha * reconstruction_loss(veiled, picture)}
            reading: dict[str, Tensor] = {}
            seen = padded(_on_the_way(veiled, generator) if run.purified else veiled)
            for name, reader in readers.items():
                with torch.no_grad(), device.precision():
                    original_middle, _ = reader.halfway(whole)
                with device.precision():
                    middle, scores = (value.float() for value in reader.halfway(seen))
                terms[name] = run.beta / len(readers) * _answer(run.target, scores, label)
                if run.likeness:
                    alike = likeness(middle, original_middle.float())
                    terms[f"{name}_likeness"] = run.likeness / len(readers) * alike
                reading[f"{name}_recognition"] = (scores.argmax(1) == label).float().mean()
            rate = learning_rate(training.iteration, run)
            descend(optimiser, sum(terms.values(), torch.zeros((), device=device.torch)), rate)
            alpha = weight.follow(float(lost))
            for reader_that_learns in learning:
                mirrored = moved(veiled.detach(), generator, mirror=run.data == "cifar10", by=2)
                reader_that_learns.learn(padded(mirrored), label, device)
            if learning and (training.iteration + 1) % run.restart == 0:
                turn = training.iteration // run.restart
                learning[turn % len(learning)].restart(turn)
            training.advance(terms | reading | {"psnr_lost": lost, "alpha": alpha}, rate)
    return training.finish(net)


class FidelityWeight:
    """α of (4), moved so that the veil costs the share of PSNR that it may: up when it costs more, down when less."""

    def __init__(self, allowed: float, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self._allowed = allowed

    def follow(self, lost: float) -> float:
        """Move by up to 5 % for a batch that lost some share of its PSNR; returns the new α."""
        error = max(-1.0, min(1.0, (lost - self._allowed) / max(self._allowed, 1e-3)))
        self.alpha = min(1e4, max(1e-3, self.alpha * (1 + 0.05 * error)))
        return self.alpha

    def state_dict(self) -> dict[str, float]:
        return {"alpha": self.alpha}

    def load_state_dict(self, state: dict[str, float], /) -> None:
        self.alpha = state["alpha"]


class LearningReader:
    """A reader in the loop: starts as a surrogate, learns on what G makes of training pictures, starts anew in turn."""

    def __init__(self, surrogates: dict[str, Classifier], place: int) -> None:
        self._surrogates, self._place = list(surrogates.values()), place
        self._begin(place)

    def learn(self, seen: Tensor, label: Tensor, device: Device) -> None:
        """One step on veiled pictures with their labels; G looks at it frozen."""
        self.net.train().requires_grad_(True)
        with device.precision():
            loss = functional.cross_entropy(self.net(seen).float(), label)
        descend(self._optimiser, loss, _READER_RATE)
        self.net.eval().requires_grad_(False)

    def restart(self, turn: int) -> None:
        """Begin anew from the next surrogate."""
        self._begin(self._place + 1 + turn)

    def _begin(self, which: int) -> None:
        self.which = which % len(self._surrogates)
        self.net = copy.deepcopy(self._surrogates[self.which])
        self._optimiser = torch.optim.SGD(self.net.parameters(), _READER_RATE, momentum=0.9, weight_decay=5e-4)

    def state_dict(self) -> dict[str, Any]:
        return {"which": self.which, "net": self.net.state_dict(), "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._begin(state["which"])
        self.net.load_state_dict(state["net"])
        self._optimiser.load_state_dict(state["optimiser"])


def _answer(target: str, scores: Tensor, label: Tensor) -> Tensor:
    if target == "uniform":
        return uniform(scores)
    if target == "unreadable":
        return unreadable(scores, label)
    return -functional.cross_entropy(scores, label)


def _on_the_way(veiled: Tensor, generator: torch.Generator) -> Tensor:
    """The first half as they are, the second through one purifier."""
    as_they_are, others = veiled.chunk(2)
    return torch.cat([as_they_are, random_purifier(others.clamp(0, 1), generator)])
