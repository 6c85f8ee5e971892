"""Adv-CSNet-E: the G of a CSNet against a set of readers for a given share of PSNR.

picture ─▶ S, frozen ─▶ s ─┬─▶ G ─▶ x' ─┬─▶ error or its logarithm; its weight follows the PSNR that may be lost
                           │            └─▶ (moved, half of them purified) ─▶ some readers ─▶ answer (and likeness)
                           └─▶ G of the CSNet, frozen ─▶ the PSNR to lose from

What stands in brackets a run may do without. Readers are frozen surrogates, and some, where a run has such, that learn
on the veiled pictures, with their labels, beside G. Those that look at one batch count by what they still read, or
evenly.
"""

import copy
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from train.data.small import Batches, SmallSet, cropped, moved, padded
from train.devices import Device
from train.loops.price import FidelityWeight, allowed, landed
from train.loops.schedule import Report, Training, descend, learning_rate
from train.models import classifier_of, csnet_of, reader_of
from train.networks.classifiers.classifier import CLASSES, Classifier
from train.objectives.paper import reconstruction_loss
from train.objectives.reconstruction import log_error, psnr
from train.objectives.veil import likeness, uniform, unreadable
from train.purifiers import random_purifier
from train.settings import EnsembleRun

log = logging.getLogger("veilcam.train")

_READER_RATE = 0.01
_MOVED_BY = 2
_NEED_AT_CHANCE = 0.02
_NEED_FORGETS = 0.9


def train(run: EnsembleRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    base = csnet_of(out.parent / run.extends / "final.pt", device)
    net = copy.deepcopy(base)
    net.reconstruction.requires_grad_(True)
    paths = {name: out.parent / name / "final.pt" for name in run.surrogates}
    surrogates = {name: reader_of(path, device)[0] for name, path in paths.items()}
    reconstruct = device.graphed(net.reconstruction)
    answer = {name: device.graphed(reader) for name, reader in surrogates.items()}
    batches = Batches(data.train.to(device.torch), run.batch, run.seed)
    optimiser = torch.optim.Adam(net.reconstruction.parameters(), lr=run.learning_rate)
    weight = FidelityWeight(device, run.weight_moves)
    started_from = {name: classifier_of(path, device)[0] for name, path in paths.items()}
    learning = LearningReaders(started_from, run.learning_readers, run.kept_readers)
    needs = Needs(device)
    fidelity = log_error if run.fidelity == "psnr" else reconstruction_loss
    parts: dict[str, Any] = {
        "net": net, "optimiser": optimiser, "weight": weight, "learning": learning, "still_read": needs
    }  # fmt: skip
    with Training(run, parts, generator, out, report, device) as training:
        while training.running:
            picture, label = batches.at(training.iteration)
            whole = padded(picture).contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), device.precision():
                measurements = base.sampling(whole)
                plain = cropped(base.reconstruction(measurements).float(), picture)
            with device.precision():
                veiled = cropped(reconstruct(measurements).float(), picture)
            lost = 1 - psnr(veiled.detach(), picture).mean() / psnr(plain, picture).mean()
            terms = {"reconstruction": weight.alpha * fidelity(veiled, picture)}
            seen, original = _on_the_way(veiled, picture, run, generator)
            readers = surrogates | learning.readers()
            names = list(readers)
            drawn = [names[place] for place in torch.randperm(len(names), generator=generator)[: run.at_once].tolist()]
            shares = needs.shares(drawn) if run.by_need else dict.fromkeys(drawn, 1 / len(drawn))
            answers, alike, read = (torch.zeros((), device=device.torch) for _ in range(3))
            for name, share in shares.items():
                reader = readers[name]
                if run.likeness:
                    with torch.no_grad(), device.precision():
                        unveiled = reader.middle(original).float()
                    with device.precision():
                        middle, scores = (value.float() for value in reader.halfway(seen))
                    alike = alike + share * likeness(middle, unveiled)
                else:
                    with device.precision():
                        scores = answer.get(name, reader)(seen).float()
                answers = answers + share * _answer(run.target, scores, label)
                read_by = (scores.argmax(1) == label).float().mean()
                needs.note(name, read_by)
                read = read + read_by / len(drawn)
            terms |= {"answers": run.beta * answers, "likeness": run.likeness * alike}
            rate = learning_rate(training.iteration, run)
            descend(optimiser, sum(terms.values(), torch.zeros((), device=device.torch)), rate)
            weight.follow(lost, allowed(training.iteration, run))
            told = {"recognition": read, "psnr_lost": lost, "alpha": weight.alpha}
            if run.learning_readers:
                learned_from = padded(moved(veiled.detach(), generator, mirror=run.data == "cifar10", by=_MOVED_BY))
                told["learning_recognition"] = learning.learn(learned_from, label, device)
                if (training.iteration + 1) % run.restart == 0:
                    learning.restart_one()
            training.advance(terms | told, rate)
    factor, costs = landed(net, base, data.train, run.psnr_lost, device)
    landing = "%s: made %.2f times as strong, costs %.2f %% of PSNR, may cost %.2f"
    level = logging.WARNING if costs > run.psnr_lost else logging.INFO
    log.log(level, landing, out.name, factor, 100 * costs, 100 * run.psnr_lost)
    return training.finish(net, landed=factor)


class Needs:
    """What each reader still reads, as a running mean, and so how much it counts for G.

    Evenly weighed, readers that were fooled long ago take most of the gradient from the one that still reads.

    Args:
        device: where the veil is trained.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._read: dict[str, Tensor] = {}

    def shares(self, readers: Sequence[str]) -> dict[str, Tensor]:
        """The share of each of some readers, by what it reads above chance; together 1."""
        unknown = torch.ones((), device=self._device.torch)
        above = torch.stack([self._read.get(name, unknown) for name in readers]) - 1 / CLASSES
        needs = above.clamp_min(0) + _NEED_AT_CHANCE
        return dict(zip(readers, needs / needs.sum(), strict=True))

    def note(self, reader: str, read: Tensor) -> None:
        """A reader read a share of a batch rightly."""
        before = self._read.get(reader, read)
        self._read[reader] = _NEED_FORGETS * before + (1 - _NEED_FORGETS) * read

    def state_dict(self) -> dict[str, float]:
        return {name: float(read) for name, read in self._read.items()}

    def load_state_dict(self, state: dict[str, float], /) -> None:
        self._read = {name: torch.tensor(read, device=self._device.torch) for name, read in state.items()}


class LearningReaders:
    """Readers in the loop, and the last of their forerunners.

    Each starts as a surrogate and learns on what G makes of training pictures. In turn one of them starts anew, from
    the next surrogate; what it had become is kept for a while, so that G doesn't forget it.

    Args:
        surrogates: to start from.
        count: of readers that learn.
        kept: of forerunners that stay.
    """

    def __init__(self, surrogates: Mapping[str, Classifier], count: int, kept: int) -> None:
        self._surrogates = list(surrogates.values())
        self._started = 0
        self._learning: list[tuple[int, Classifier, torch.optim.Optimizer]] = []
        self._kept: deque[tuple[int, Classifier]] = deque(maxlen=kept)
        for _ in range(count):
            self._learning.append(self._begin(self._started))
            self._started += 1

    def readers(self) -> dict[str, Classifier]:
        """All of them, frozen, by names that stay theirs; those that learn first."""
        all_of_them = [*((number, net) for number, net, _ in self._learning), *self._kept]
        return {f"started_{number}": net for number, net in all_of_them}

    def learn(self, seen: Tensor, label: Tensor, device: Device) -> Tensor:
        """One step of each on veiled pictures with their labels; returns the share that they read."""
        read = torch.zeros((), device=device.torch)
        for _, net, optimiser in self._learning:
            net.train().requires_grad_(True)
            with device.precision():
                scores = net(seen).float()
            descend(optimiser, functional.cross_entropy(scores, label), _READER_RATE)
            net.eval().requires_grad_(False)
            read = read + (scores.argmax(1) == label).float().mean() / len(self._learning)
        return read

    def restart_one(self) -> None:
        """The one that has learned longest starts anew."""
        if self._learning:
            number, net, _ = self._learning.pop(0)
            self._kept.append((number, net))
            self._learning.append(self._begin(self._started))
            self._started += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "started": self._started,
            "learning": [(number, net.state_dict(), opt.state_dict()) for number, net, opt in self._learning],
            "kept": [(number, net.state_dict()) for number, net in self._kept],
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._started = state["started"]
        self._learning.clear()
        self._kept.clear()
        for number, weights, optimiser_state in state["learning"]:
            _, net, optimiser = self._begin(number)
            net.load_state_dict(weights)
            optimiser.load_state_dict(optimiser_state)
            self._learning.append((number, net, optimiser))
        for number, weights in state["kept"]:
            _, net, _ = self._begin(number)
            net.load_state_dict(weights)
            self._kept.append((number, net))

    def _begin(self, number: int) -> tuple[int, Classifier, torch.optim.Optimizer]:
        net = copy.deepcopy(self._surrogates[number % len(self._surrogates)])
        return number, net, torch.optim.SGD(net.parameters(), _READER_RATE, momentum=0.9, weight_decay=5e-4)


def _answer(target: str, scores: Tensor, label: Tensor) -> Tensor:
    if target == "softmax":
        return -functional.cross_entropy(scores.softmax(1), label)
    if target == "uniform":
        return uniform(scores)
    if target == "unreadable":
        return unreadable(scores, label)
    return -functional.cross_entropy(scores, label)


def _on_the_way(veiled: Tensor, picture: Tensor, run: EnsembleRun, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What readers see: both moved alike, and the second half of the veiled ones through one purifier."""
    if run.moved:
        both = moved(torch.cat([veiled, picture], 1), generator, mirror=run.data == "cifar10", by=_MOVED_BY)
        veiled, picture = both[:, :1], both[:, 1:]
    if run.purified:
        as_they_are, others = veiled.chunk(2)
        veiled = torch.cat([as_they_are, random_purifier(others.clamp(0, 1), generator)])
    return padded(veiled), padded(picture)
