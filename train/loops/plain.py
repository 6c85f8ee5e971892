"""Train S and G together by mean squared error, quantiser in the loop."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from encoder.sampling import nearest_rows
from train import checkpoint
from train.data.photographs import Photographs
from train.networks import phi as rows_of_phi
from train.networks.quarter import QuarterCSNet
from train.objectives.reconstruction import psnr, squared_error
from train.settings import PlainRun, SettingsError

REPORT_EVERY = 100
SAVE_EVERY = 500

Report = Callable[[dict[str, Any]], None]


def learning_rate(iteration: int, run: Any) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if iteration < run.warm_up:
        return float(run.learning_rate * (iteration + 1) / run.warm_up)
    done = (iteration - run.warm_up) / max(1, run.iterations - run.warm_up)
    return float(run.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))))


def train(run: PlainRun, folder: Path, out: Path, finished: Path, report: Report) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``.

    Args:
        folder: photographs to learn from.
        out: where checkpoint and log go.
        finished: where the runs that this one extends lie, a folder each.
        report: called with each row of the log.
    """
    generator = torch.Generator().manual_seed(run.seed)
    torch.manual_seed(run.seed)
    data = Photographs(folder, run.crop, generator)
    net = _network(run, data, finished).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(run.average))  # type: ignore[no-untyped-call]
    optimiser = torch.optim.Adam(net.parameters(), lr=run.learning_rate)
    start = _resume(out / "last.pt", run, net, averaged, optimiser, generator)
    log = checkpoint.Log(out / "log.csv", keep_until=start)
    began, total = time.monotonic(), 0.0
    for iteration in range(start, run.iterations):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(iteration, run)
        picture = data.batch(run.batch).contiguous(memory_format=torch.channels_last)
        reconstruction = net(picture)
        loss = squared_error(reconstruction, picture)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        averaged.update_parameters(net)
        total += float(psnr(reconstruction.detach(), picture).mean())
        step = iteration + 1
        if step % REPORT_EVERY == 0 or step == run.iterations:
            done = (step - 1) % REPORT_EVERY + 1
            seconds = time.monotonic() - began
            row = {"iteration": step, "loss": f"{loss.item():.6f}", "psnr": f"{total / done:.3f}"}
            row |= {"learning_rate": f"{optimiser.param_groups[0]['lr']:.2e}", "seconds": f"{seconds:.1f}"}
            log.write(row)
            report(row)
            total = 0.0
        if step % SAVE_EVERY == 0 or step == run.iterations:
            state = {"net": net.state_dict(), "averaged": averaged.state_dict(), "optimiser": optimiser.state_dict()}
            state |= {"generator": generator.get_state(), "iteration": step, "run": _described(run)}
            checkpoint.save(out / "last.pt", state)
    log.close()
    final = {"net": averaged.module.state_dict(), "run": _described(run), "provenance": checkpoint.provenance()}
    checkpoint.save(out / "final.pt", final)
    return out / "final.pt"


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
    base, _ = network_of(finished / run.extends / "final.pt")
    known = base.sampling.phi().detach()
    if len(known) >= rows:
        raise SettingsError(f"ratio = {run.ratio}: {run.extends} has {len(known)} rows already")
    phi = torch.cat([known, rows_of_phi.principal_rows(moment, rows - len(known), known)])
    net = QuarterCSNet(phi, len(known), run.channels, run.residual_blocks)
    for name in ("deep", "last"):
        getattr(net.reconstructor, name).load_state_dict(getattr(base.reconstructor, name).state_dict())
    return net


def _described(run: Any) -> dict[str, Any]:
    return {"kind": run.kind, **asdict(run)}


def _resume(
    path: Path,
    run: Any,
    net: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return 0
    state = checkpoint.load(path)
    if state["run"] != _described(run):
        raise checkpoint.CheckpointError(f"{path}: of a run with other settings; move it away to start anew")
    net.load_state_dict(state["net"])
    averaged.load_state_dict(state["averaged"])
    optimiser.load_state_dict(state["optimiser"])
    generator.set_state(state["generator"])
    return int(state["iteration"])
