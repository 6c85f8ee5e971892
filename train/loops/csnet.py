"""Train the paper's S and G together by mean squared error, equation (5)."""

from pathlib import Path
from typing import Any

import torch

from train import checkpoint
from train.data.small import Batches, SmallSet, cropped, padded
from train.devices import Device
from train.loops.schedule import Report, Training, descend, stepped_rate
from train.networks import phi
from train.networks.csnet import BLOCK, CSNet, floor_rows
from train.objectives.paper import reconstruction_loss
from train.objectives.reconstruction import psnr
from train.settings import CSNetRun, SettingsError


def train(run: CSNetRun, data: SmallSet, device: Device, out: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    net = CSNet(_rows(run))
    if run.start == "principal":
        blocks = padded(data.train.x).reshape(-1, BLOCK)
        net.start_from(phi.principal_rows(phi.covariance([blocks], BLOCK), _rows(run)))
    net = device.placed(net)
    batches = Batches(data.train.to(device.torch), run.batch, run.seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=run.learning_rate)
    compiled = device.compiled(net)
    with Training(run, {"net": net, "optimiser": optimiser}, generator, out, report) as training:
        while training.running:
            picture, _ = batches.at(training.iteration)
            whole = padded(picture).contiguous(memory_format=torch.channels_last)
            with device.precision():
                reconstruction = cropped(compiled(whole).float(), picture)
            loss = reconstruction_loss(reconstruction, picture)
            rate = stepped_rate(training.iteration, run)
            descend(optimiser, loss, rate)
            training.advance({"loss": loss, "psnr": psnr(reconstruction.detach(), picture).mean()}, rate)
    return training.finish(net)


def csnet_of(path: Path, device: Device, kind: str = CSNetRun.kind) -> tuple[CSNet, dict[str, Any]]:
    """A finished CSNet, or one of another kind of run, frozen and in evaluation mode, and its checkpoint."""
    state = checkpoint.load(path)
    if state["run"].get("kind") != kind or "provenance" not in state:
        raise checkpoint.CheckpointError(f"{path}: expected the final checkpoint of a {kind} run")
    weights = state["net"]
    try:
        net = CSNet(len(weights["sampling.weight"]))
        net.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise checkpoint.CheckpointError(f"{path}: not the weights of a CSNet ({error})") from None
    return device.placed(net.eval().requires_grad_(False)), state


def _rows(run: CSNetRun) -> int:
    rows = floor_rows(run.ratio)
    if rows < 1:
        raise SettingsError(f"ratio = {run.ratio}: gives no measurement for a block of side {BLOCK}")
    return rows
