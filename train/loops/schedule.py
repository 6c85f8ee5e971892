"""What every loop shares: the learning rate, and the state that lets an interrupted run go on as if it had not been."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from train import checkpoint
from train.settings import PlainRun, VeilRun

REPORT_EVERY = 50
SAVE_EVERY = 500


def learning_rate(iteration: int, run: PlainRun | VeilRun) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if iteration < run.warm_up:
        return run.learning_rate * (iteration + 1) / run.warm_up
    done = (iteration - run.warm_up) / max(1, run.iterations - run.warm_up)
    return run.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def described(run: PlainRun | VeilRun) -> dict[str, Any]:
    """A run's settings as plain values."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in {"kind": run.kind, **asdict(run)}.items()}


class Training:
    """A network on its way: weights, their moving average, optimiser, random state and iteration, saved as one."""

    def __init__(self, run: PlainRun | VeilRun, net: nn.Module, generator: torch.Generator, out: Path) -> None:
        self.run = run
        self.net = net
        self.generator = generator
        self.averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(run.average))  # type: ignore[no-untyped-call]
        self.optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=run.learning_rate)
        self.iteration = 0
        # Of the code that this process runs, not of what is checked out when it ends.
        self._provenance = checkpoint.provenance()
        self._path = out / "last.pt"
        out.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._resume()

    def step(self, loss: torch.Tensor) -> None:
        """One optimiser step, at the learning rate that is due; saves now and then."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.iteration, self.run)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.averaged.update_parameters(self.net)
        self.iteration += 1
        if self.iteration % SAVE_EVERY == 0 or self.iteration == self.run.iterations:
            self._save()

    def finish(self) -> Path:
        """Write the averaged weights, with what they came from, to ``final.pt`` beside the checkpoint."""
        final = self._path.with_name("final.pt")
        state = {"net": self.averaged.module.state_dict(), "run": described(self.run)}
        checkpoint.save(final, state | {"provenance": self._provenance})
        return final

    def _save(self) -> None:
        state: dict[str, Any] = {"net": self.net.state_dict(), "averaged": self.averaged.state_dict()}
        state["optimiser"] = self.optimiser.state_dict()
        state |= {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        checkpoint.save(self._path, state | {"iteration": self.iteration, "run": described(self.run)})

    def _resume(self) -> None:
        state = checkpoint.load(self._path)
        if state["run"] != described(self.run):
            raise checkpoint.CheckpointError(f"{self._path}: of a run with other settings; move it away to start anew")
        self.net.load_state_dict(state["net"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        self.iteration = int(state["iteration"])
