"""Adv-CSNet: train the G of a CSNet against a discriminator that learns beside it, equations (7) to (12).

                          ┌─▶ D_rec ─▶ which class (of originals)        one step each, in turn:
picture ──────────────────┴─▶ D_rf ──▶ real or not          ◀┐           D_rec, D_rf, G
   └─▶ S, frozen ─▶ s ─▶ G ─▶ x' ─────────── detached ───────┘
                              └─▶ D, held ─▶ real, please; and no class, please; and near the picture
"""

from pathlib import Path

import torch

from train.data.small import Batches, SmallSet, cropped, padded
from train.devices import Device
from train.loops.schedule import Report, Stateful, Training, descend, stepped_rate
from train.models import csnet_of
from train.networks.discriminator import Discriminator
from train.objectives.paper import against_discriminator, discriminator_of_class, discriminator_of_real
from train.objectives.reconstruction import psnr
from train.settings import GenerativeRun


def train(run: GenerativeRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    net = csnet_of(out.parent / run.extends / "final.pt", device)
    net.reconstruction.requires_grad_(True)
    judge = device.placed(Discriminator())
    batches = Batches(data.train.to(device.torch), run.batch, run.seed)
    optimiser = torch.optim.Adam(net.reconstruction.parameters(), lr=run.learning_rate)
    of_real, of_class = (
        torch.optim.Adam([*judge.trunk.parameters(), *head.parameters()], lr=run.learning_rate)
        for head in (judge.real, judge.recognised)
    )
    parts: dict[str, Stateful] = {"net": net, "discriminator": judge}
    parts |= {"optimiser": optimiser, "of_real": of_real, "of_class": of_class}
    graphed = device.graphed(net)
    with Training(run, parts, generator, out, report, device) as training:
        while training.running:
            picture, label = batches.at(training.iteration)
            rate = stepped_rate(training.iteration, run)
            whole = padded(picture).contiguous(memory_format=torch.channels_last)
            with device.precision():
                reconstruction = cropped(graphed(whole).float(), picture)
            seen = padded(reconstruction)
            told = {"psnr": psnr(reconstruction.detach(), picture).mean()}
            if run.gamma_d:
                with device.precision():
                    scores = judge(whole)[1].float()
                terms = discriminator_of_class(scores, label, run.gamma_d)
                descend(of_class, terms["D_rec"], rate)
                told |= terms | {"originals_recognition": (scores.argmax(1) == label).float().mean()}
            with device.precision():
                real = judge(torch.cat([whole, seen.detach()]))[0].float()
            terms = discriminator_of_real(real[: len(whole)], real[len(whole) :], run.lambda_d)
            descend(of_real, terms["D_rf"], rate)
            told |= terms
            judge.requires_grad_(False)
            with device.precision():
                real, scores = judge(seen)
            weights = {"alpha": run.alpha, "lambda_g": run.lambda_g, "gamma_g": run.gamma_g}
            terms = against_discriminator(reconstruction, picture, real.float(), scores.float(), label, **weights)
            descend(optimiser, sum(terms.values(), torch.zeros((), device=device.torch)), rate)
            judge.requires_grad_(True)
            told |= terms | {"D_recognition": (scores.argmax(1) == label).float().mean()}
            training.advance(told, rate)
    return training.finish(net)
