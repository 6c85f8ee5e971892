"""What every loop shares: the learning rate, and the state that lets an interrupted run go on as if it had not been."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train import checkpoint
from train.devices import Device
from train.settings import Run, SteppedRun

log = logging.getLogger("veilcam.train")

Report = Callable[[dict[str, Any]], None]
"""Called with each row of a log."""

REPORT_EVERY = 50
SAVE_AFTER_S = 30.0
"""Saved with a report, so that no term that was summed for one is lost, and not more often than so."""
THEN = ", then "
"""Between the machines, and between the commits, that a run went on with."""


class Stateful(Protocol):
    """What can be saved and go on: a network, its average, an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class Smooth(Protocol):
    """A run whose learning rate warms up and then falls smoothly."""

    @property
    def iterations(self) -> int: ...
    @property
    def warm_up(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...


def learning_rate(iteration: int, run: Smooth) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if iteration < run.warm_up:
        return run.learning_rate * (iteration + 1) / run.warm_up
    done = (iteration - run.warm_up) / max(1, run.iterations - run.warm_up)
    return run.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def stepped_rate(iteration: int, run: SteppedRun) -> float:
    """A tenth after each drop, as the paper has it."""
    return run.learning_rate * 0.1 ** sum(iteration >= drop for drop in run.drops)


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One optimiser step at a learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def described(run: Run) -> dict[str, Any]:
    """A run's settings as plain values."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in {"kind": run.kind, **asdict(run)}.items()}


def fingerprints(runs: Path, names: Iterable[str]) -> dict[str, str]:
    """Finished runs of a folder, by name, as ``checkpoint.fingerprint`` knows them."""
    return {name: checkpoint.fingerprint(runs / name / "final.pt") for name in names}


def replaced(runs: Path, needs: Mapping[str, str]) -> list[str]:
    """Of the runs that something was made from, by name and fingerprint, those that are there as others now."""
    there = fingerprints(runs, [name for name in needs if (runs / name / "final.pt").exists()])
    return sorted(name for name, fingerprint in there.items() if fingerprint != needs[name])


def settings_told(told: Mapping[str, Any], kind: type[Run]) -> dict[str, Any]:
    """All settings of a kind of run, as a checkpoint told of them.

    One that is older than a setting did as ``formerly`` says, else it has that setting's default.
    """
    return {**described(kind()), **kind.formerly, **told}


def same_settings(told: Mapping[str, Any], run: Run) -> bool:
    """Whether a checkpoint is of a run's settings, as ``changed_settings`` knows them."""
    return not changed_settings(told, run)


def changed_settings(told: Mapping[str, Any], run: Run) -> dict[str, tuple[Any, Any]]:
    """The settings that a checkpoint told of and that a run has otherwise, each as it was and as it is.

    What no run has any more is None now.
    """
    then, now = settings_told(told, type(run)), described(run)
    return {key: (then[key], now.get(key)) for key in then if key not in now or then[key] != now[key]}


class Training:
    """A run on its way: all that moves, random state and iteration, saved as one, and its log.

    Args:
        run: its settings; a checkpoint of other settings is refused.
        parts: networks and optimisers by name.
        generator: what the loop draws from.
        out: where ``last.pt``, ``final.pt`` and ``log.csv`` go. A run that is there goes on.
        report: called with each row of the log.
        device: that trains, for what is told of the result.
        finished: where the runs lie that this one needs; beside ``out`` if it isn't named.

    Raises:
        CheckpointError: what is there can't go on: of other settings, or begun with other runs than are there now; or
            a run that is needed hasn't finished.
    """

    def __init__(
        self,
        run: Run,
        parts: Mapping[str, Stateful],
        generator: torch.Generator,
        out: Path,
        report: Report,
        device: Device | None = None,
        finished: Path | None = None,
    ) -> None:
        self.run = run
        self.iteration = 0
        self._parts, self._generator, self._report = parts, generator, report
        # Of the code that this process runs, not of what is checked out when it ends.
        self._provenance = checkpoint.provenance()
        if device is not None:
            self._provenance["device"] = device.told
        self._path, self._finished = out / "last.pt", finished or out.parent
        self._needs = fingerprints(self._finished, [name for name, _ in run.needs])
        out.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._resume()
        self._log = checkpoint.Log(out / "log.csv", keep_until=self.iteration)
        self._terms: dict[str, Tensor | float] = {}
        self._rate = 0.0
        self._began, self._summed_from = time.monotonic(), self.iteration
        self._saved = self._began

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, broken: type[BaseException] | None, *_: object) -> None:
        if broken is None and self.iteration > self._summed_from:  # it ended before its iterations did
            self._tell()
            self._save()
        self._log.close()

    @property
    def running(self) -> bool:
        """There are iterations left."""
        return self.iteration < self.run.iterations

    def advance(self, terms: Mapping[str, Tensor | float], rate: float) -> None:
        """Count an iteration; report and save when it is time to.

        Args:
            terms: tensors go into the log as means since its last row, plain numbers as they are now.
        """
        self.iteration += 1
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term.detach() if isinstance(term, Tensor) else term
        self._rate = rate
        if self.iteration % REPORT_EVERY == 0 or not self.running:
            self._tell()
            if not self.running or time.monotonic() - self._saved >= SAVE_AFTER_S:
                self._save()
                self._saved = time.monotonic()

    def _tell(self) -> None:
        count = self.iteration - self._summed_from
        row: dict[str, Any] = {"iteration": self.iteration}
        means = {name: float(t) / count if isinstance(t, Tensor) else t for name, t in self._terms.items()}
        row |= {name: f"{value:.5g}" for name, value in means.items()}
        row |= {"learning_rate": f"{self._rate:.2e}", "seconds": f"{time.monotonic() - self._began:.1f}"}
        self._log.write(row)
        self._report(row)
        self._terms, self._summed_from = {}, self.iteration

    def finish(self, net: nn.Module, **told: Any) -> Path:
        """Write a network's weights, with what they came from, to ``final.pt`` beside the checkpoint."""
        final = self._path.with_name("final.pt")
        checkpoint.save(final, {"net": net.state_dict(), **self._told(), **told})
        return final

    def _told(self) -> dict[str, Any]:
        return {"run": described(self.run), "provenance": self._provenance, "needs": self._needs}

    def _save(self) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"generator": self._generator.get_state(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        checkpoint.save(self._path, {"iteration": self.iteration, **state, **self._told()})

    def _resume(self) -> None:
        state = checkpoint.load(self._path)
        if not same_settings(state["run"], self.run):
            raise checkpoint.CheckpointError(f"{self._path}: of a run with other settings; move it away to start anew")
        if others := replaced(self._finished, state.get("needs", {})):
            problem = f"begun with other runs of {', '.join(others)} than are there now; move it away to start anew"
            raise checkpoint.CheckpointError(f"{self._path}: {problem}")
        if self._needs and "needs" not in state:
            log.warning("%s: begun before runs told what they are made from, so that isn't known", self._path)
        self._needs = state.get("needs", {})
        try:
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError) as error:
            problem = f"of another version of the program ({error}); move it away to start anew"
            raise checkpoint.CheckpointError(f"{self._path}: {problem}") from None
        for key, begun in state.get("provenance", {}).items():
            if key in self._provenance:
                self._provenance[key] = THEN.join(dict.fromkeys([*begun.split(THEN), self._provenance[key]]))
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        self.iteration = int(state["iteration"])
        log.info("%s goes on at %d of %d", self._path.parent.name, self.iteration, self.run.iterations)
