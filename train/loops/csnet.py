"""Train the paper's S and G together by mean squared error, equation (5)."""

from pathlib import Path

import torch

from train.data.small import Batches, SmallSet, cropped, padded
from train.devices import Device
from train.evaluation.small import mean_psnr, mean_ssim
from train.loops.schedule import Report, Training, descend, stepped_rate
from train.models import pictures_of
from train.networks import phi
from train.networks.csnet import BLOCK, CSNet, floor_rows
from train.objectives.paper import reconstruction_loss
from train.objectives.reconstruction import psnr
from train.settings import CSNetRun


def train(run: CSNetRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``.

    The final checkpoint tells ``psnr`` in dB and ``ssim``, means over the test pictures.
    """
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    net = CSNet(floor_rows(run.ratio))
    if run.start == "principal":
        blocks = padded(data.train.x).reshape(-1, BLOCK)
        net.start_from(phi.principal_rows(phi.covariance([blocks], BLOCK), floor_rows(run.ratio)))
    net = device.placed(net)
    batches = Batches(data.train.to(device.torch), run.batch, run.seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=run.learning_rate)
    graphed = device.graphed(net)
    with Training(run, {"net": net, "optimiser": optimiser}, generator, out, report, device) as training:
        while training.running:
            picture, _ = batches.at(training.iteration)
            whole = padded(picture).contiguous(memory_format=torch.channels_last)
            with device.precision():
                reconstruction = cropped(graphed(whole).float(), picture)
            loss = reconstruction_loss(reconstruction, picture)
            rate = stepped_rate(training.iteration, run)
            descend(optimiser, loss, rate)
            training.advance({"loss": loss, "psnr": psnr(reconstruction.detach(), picture).mean()}, rate)
    made = pictures_of(net.eval(), data.test, device)
    return training.finish(net, psnr=mean_psnr(made, data.test), ssim=mean_ssim(made, data.test))
