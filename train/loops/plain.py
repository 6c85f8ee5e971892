"""Train S and G together by mean squared error, quantiser in the loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from encoder.sampling import nearest_rows
from train import checkpoint
from train.data.photographs import Photographs
from train.loops.schedule import Report, Training, descend, learning_rate
from train.networks import phi as rows_of_phi
from train.networks.quarter import QuarterCSNet
from train.objectives.reconstruction import psnr, squared_error
from train.settings import PlainRun, SettingsError


def train(run: PlainRun, folders: Sequence[Path], out: Path, finished: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``.

    Args:
        folders: of photographs to learn from.
        out: where checkpoint and log go.
        finished: where the runs that this one extends lie, a folder each.
        report: called with each row of the log.
    """
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    data = Photographs(folders, generator)
    net = _network(run, data, finished).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(run.average))  # type: ignore[no-untyped-call]
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=run.learning_rate)
    parts = {"net": net, "averaged": averaged, "optimiser": optimiser}
    with Training(run, parts, generator, out, report, finished=finished) as training:
        while training.running:
            picture = data.batch(run.batch, run.crop).contiguous(memory_format=torch.channels_last)
            reconstruction = net(picture)
            loss = squared_error(reconstruction, picture)
            rate = learning_rate(training.iteration, run)
            descend(optimiser, loss, rate)
            averaged.update_parameters(net)
            training.advance({"loss": loss, "psnr": psnr(reconstruction.detach(), picture).mean()}, rate)
    result = averaged.module
    assert isinstance(result, QuarterCSNet)
    result.order_rows(rows_of_phi.covariance(data.pictures, run.block))
    return training.finish(result)


def network_of(path: Path) -> tuple[QuarterCSNet, dict[str, Any]]:
    """The network of a finished plain run, ready for inference, and the checkpoint it came from."""
    state = checkpoint.load(path)
    run = state["run"]
    if run.get("kind") != PlainRun.kind or "provenance" not in state:
        raise checkpoint.CheckpointError(f"{path}: expected the final checkpoint of a plain run")
    weights: dict[str, Tensor] = state["net"]
    frozen = len(weights["sampling.head"])
    phi = torch.cat([weights["sampling.head"], weights["sampling.tail"]])
    net = QuarterCSNet(phi, frozen, run["channels"], run["residual_blocks"])
    net.load_state_dict(weights)
    return net.eval(), state


def _network(run: PlainRun, data: Photographs, finished: Path) -> QuarterCSNet:
    moment = rows_of_phi.covariance(data.pictures, run.block)
    rows = nearest_rows(run.ratio, run.block)
    if rows < 1:
        raise SettingsError(f"ratio = {run.ratio}: gives no row for a block of side {run.block}")
    if not run.extends:
        return QuarterCSNet(rows_of_phi.principal_rows(moment, rows), 0, run.channels, run.residual_blocks)
    base, state = network_of(finished / run.extends / "final.pt")
    known = base.sampling.phi().detach()
    if len(known) > rows:
        raise SettingsError(
            f"ratio = {run.ratio}: {run.extends} has {len(known)} rows, more than the {rows} of this run"
        )
    more = rows_of_phi.principal_rows(moment, rows - len(known), known) if len(known) < rows else known[:0]
    net = QuarterCSNet(torch.cat([known, more]), len(known), run.channels, run.residual_blocks)
    if (run.channels, run.residual_blocks) == (state["run"]["channels"], state["run"]["residual_blocks"]):
        for name in ("deep", "last"):
            getattr(net.reconstructor, name).load_state_dict(getattr(base.reconstructor, name).state_dict())
    return net
