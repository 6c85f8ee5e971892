"""Refine the pictures of a CSNet, which stays as it is, by mean squared error, equation (5)."""

from pathlib import Path

import torch
from torch import Tensor

from train.data.small import Batches, SmallSet, cropped, moved, padded
from train.devices import Device
from train.loops.schedule import Report, Stateful, Training, descend, learning_rate
from train.models import csnet_of
from train.networks.refinement import Refinement
from train.objectives.paper import reconstruction_loss
from train.objectives.reconstruction import psnr
from train.settings import RefinedRun


def train(run: RefinedRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``.

    Layers run in half precision where the device has it; what was measured is agreed with outside it.
    """
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    net = csnet_of(out.parent / run.extends / "final.pt", device)
    refinement = device.placed(Refinement(net.span(), net.reconstruction.block))
    batches = Batches(data.train.to(device.torch), run.batch, run.seed)
    optimiser = torch.optim.Adam(refinement.deep.parameters(), lr=run.learning_rate)
    graphed = device.graphed(refinement.deep)

    def deep(pictures: Tensor) -> Tensor:
        with device.precision():
            return graphed(pictures).float()

    parts: dict[str, Stateful] = {"deep": refinement.deep, "optimiser": optimiser}
    with Training(run, parts, generator, out, report, device) as training:
        while training.running:
            picture, _ = batches.at(training.iteration)
            picture = moved(picture, generator, mirror=run.data == "cifar10", by=0)
            whole = padded(picture).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                measured = refinement.measured_of(whole)
                with device.precision():
                    plain = net(whole).float()
            refined = cropped(refinement(plain, measured, deep=deep), picture)
            loss = reconstruction_loss(refined, picture)
            rate = learning_rate(training.iteration, run)
            descend(optimiser, loss, rate)
            told = {"loss": loss, "psnr": psnr(refined.detach(), picture).mean()}
            training.advance(told | {"psnr_before": psnr(cropped(plain, picture), picture).mean()}, rate)
    net.refinement = refinement
    return training.finish(net)
