"""Steps along carried readers' gradients, in place of a trained veil: how far they go is found for a price in PSNR."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.data.small import SIDE, Batches, SmallSet, cropped, padded
from train.devices import Device, exactly
from train.loops.schedule import Report, Training
from train.models import classifier_of, csnet_of, refined_of, retrained_of
from train.networks.classifiers.classifier import Classifier
from train.networks.classifiers.reversible import reversible
from train.networks.steps import Steps
from train.objectives.reconstruction import psnr
from train.settings import SettingsError, StepsRun

_FIRST_SIZE = 0.04
_LEAST_ADDED = 1e-5
_MOVES_AT_MOST = 1.5


@torch.no_grad()
def train(run: StepsRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Find the size by a run's settings, going on from ``out/last.pt`` if it is there; returns ``out/final.pt``.

    The error's energy grows with the square of the size, so each batch of training pictures tells of a better one; the
    logarithms of what they tell are averaged (Robbins and Monro 1951, ``learning_rate`` / iteration).
    """
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    path = out.parent / run.start / "final.pt"
    if run.refined:
        net, state = refined_of(path, device)
        if (of := state["run"]["extends"]) != run.extends:
            raise SettingsError(f"refined: {run.refined} refines {of}, expected {run.extends}")
    else:
        net = csnet_of(path, device)
    carried = [classifier_of(out.parent / name / "final.pt", device) for name in run.surrogates]
    guide, guided = retrained_of(out.parent / run.guide / "final.pt", device)
    if guided["run"]["model"] != run.start:
        problem = f"{run.guide} learned from pictures of {guided['run']['model']}, expected {run.start}"
        raise SettingsError(f"guide: {problem}")
    readers = [reader for reader, _ in carried]
    for name, reader in zip((run.guide, *run.surrogates), (guide, *readers), strict=True):
        if problem := not_carried(reader):
            raise SettingsError(f"{'guide' if reader is guide else 'surrogates'}: {name} {problem}")
    steps = device.placed(Steps(guide, readers, run.steps, run.through))
    steps.size.fill_(_FIRST_SIZE)
    batches = Batches(data.train.to(device.torch), run.batch, run.seed)
    with exactly(), Training(run, {"steps": Size(steps)}, generator, out, report, device) as training:
        while training.running:
            picture, _ = batches.at(training.iteration)
            whole = padded(picture).contiguous(memory_format=torch.channels_last)
            plain = net(whole)
            moved = steps(plain)
            before, after = (psnr(cropped(each, picture), picture).mean() for each in (plain, moved))
            unrefined = net.reconstruction(net.sampling(whole)) if run.refined else plain
            theirs = psnr(cropped(unrefined, picture), picture).mean()
            # What was won by refining may be spent on steps too.
            spendable = before - (1 - run.psnr_lost) * theirs
            if training.iteration == 0 and spendable <= 0:
                raise SettingsError(
                    f"psnr_lost: {run.refined} loses more than {run.psnr_lost} before any step is taken"
                )
            rate = run.learning_rate / (training.iteration + 1)
            wanted = 0.5 * torch.log(_energy(spendable) / _energy(before - after))
            steps.size.mul_(torch.exp(rate * wanted.clamp(-_MOVES_AT_MOST, _MOVES_AT_MOST)))
            training.advance({"psnr_lost": 1 - after / theirs, "size": steps.size}, rate)
    net.after = steps
    networks = [state["run"]["network"] for _, state in carried]
    return training.finish(net, guide=guided["network"], networks=networks)


def _energy(lost: Tensor) -> Tensor:
    """What is added to the error when so many dB are lost, as a part of what it was."""
    return torch.expm1(lost * (math.log(10) / 10)).clamp_min(_LEAST_ADDED)


def not_carried(classifier: Classifier) -> str:
    """Why a decoder can't carry a classifier, whose layers the way back isn't known of; nothing if it can."""
    try:
        reversible(classifier, torch.zeros(1, 1, SIDE, SIDE, device=classifier.mean.device))
    except TypeError as error:
        return f"can't be carried by a decoder ({error})"
    return ""


class Size:
    """All that moves: the size of the change."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def state_dict(self) -> dict[str, Any]:
        return {"size": float(self._steps.size)}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._steps.size.fill_(state["size"])
