"""Everything behind the paper's tables, in the order in which one thing needs another, skipping what is done.

csnet ─┬─▶ adversarial ─┐
classifiers ─┤─▶ ensemble ──┼─▶ measure ─▶ retrain readers ─▶ (veilcam-train report)
       └─▶ generative ──┘
"""

import dataclasses
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from train import checkpoint
from train.data.small import SmallSet
from train.devices import Device
from train.evaluation.small import Reader, measure_model, passes
from train.loops.classifier import classifier_of
from train.loops.csnet import csnet_of
from train.loops.schedule import described
from train.loops.small import LOOPS
from train.models import MODEL_KINDS, model_of
from train.settings import (
    AdversarialRun,
    ClassifierRun,
    CSNetRun,
    EnsembleRun,
    GenerativeRun,
    Measurement,
    RetrainedRun,
    SettingsError,
    SmallRun,
    read_measurement,
    read_run,
)

log = logging.getLogger("veilcam.train")

RUN_FILES = Path(__file__).parent / "runs" / "paper"
SCHEDULES = ("reduced", "full")
MEASUREMENT = "measurement.toml"
EVALUATION = "evaluation.json"

_ORDER: tuple[type[SmallRun], ...] = (
    CSNetRun, ClassifierRun, AdversarialRun, GenerativeRun, EnsembleRun, RetrainedRun,
)  # fmt: skip
_TRIED_ITERATIONS, _TRIED_TRAIN, _TRIED_TEST = 4, 500, 250

Advance = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Step:
    """A run to train, or (``run`` None) a model to measure.

    Attributes:
        name: of the run; its folder is called so.
        run: its settings.
        needs: runs that must have finished.
        file: where its settings are written down.
    """

    name: str
    run: SmallRun | None
    needs: tuple[str, ...]
    file: Path

    @property
    def told(self) -> str:
        """For a person."""
        return f"measure {self.name}" if self.run is None else f"{self.run.kind} {self.name}"


class Schedule:
    """The run files of one folder and how their models are measured.

    Raises:
        SettingsError: a file can't be used, or one names a run that isn't there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MEASUREMENT).is_file():
            raise SettingsError(f"{folder}: no schedule there, expected run files and {MEASUREMENT}")
        self.measurement: Measurement = read_measurement(folder / MEASUREMENT)
        self.runs: dict[str, SmallRun] = {}
        for path in sorted(folder.glob("*.toml")):
            if path.name != MEASUREMENT:
                run = read_run(path)
                if not isinstance(run, SmallRun):
                    raise SettingsError(f"{path}: a {run.kind} run has no place in a schedule")
                self.runs[path.stem] = run
        for name in self.runs:
            for needed in self._needs(name):
                if needed not in self.runs:
                    raise SettingsError(f"{folder / name}.toml: needs {needed}, which has no run file beside it")

    @property
    def models(self) -> list[str]:
        """Runs that give pictures."""
        return [name for name, run in self.runs.items() if run.kind in MODEL_KINDS]

    def classifiers(self, data: str) -> list[str]:
        """Classifier runs of a data set."""
        return [n for n, run in self.runs.items() if isinstance(run, ClassifierRun) and run.data == data]

    def base(self, model: str) -> str | None:
        """The CSNet that a model extends."""
        return getattr(self.runs[model], "extends", None)

    def purified(self, model: str) -> bool:
        """Whether a model is measured beside controls and through purifiers."""
        return any(fnmatch(model, pattern) for pattern in self.measurement.purified)

    def retrained(self) -> dict[str, RetrainedRun]:
        """Cells of readers retrained on models, by run name."""
        cells = {}
        for model in self.models:
            if not any(fnmatch(model, pattern) for pattern in self.measurement.retrained):
                continue
            for reader in self.measurement.readers:
                for scratch in (False, True)[: 1 + self.measurement.scratch]:
                    name = f"{reader}-{'anew' if scratch else 'retrained'}-on-{model}"
                    iterations = self.measurement.retrained_iterations
                    rate = 0.1 if scratch else 0.01
                    cells[name] = RetrainedRun(
                        reader=reader, model=model, scratch=scratch, iterations=iterations, learning_rate=rate
                    )
        return cells

    def steps(self, only: Sequence[str] = ()) -> list[Step]:
        """All steps in order, or those whose names match a wildcard, with what they need.

        Raises:
            SettingsError: a wildcard matches nothing.
        """
        steps = [Step(name, run, self._needs(name), self.folder / f"{name}.toml") for name, run in self.runs.items()]
        how = self.folder / MEASUREMENT
        for name in self.models:
            base = self.base(name)
            readers = self.classifiers(self.runs[name].data)
            steps.append(Step(name, None, (name, *readers, *([base] if base else [])), how))
        steps += [Step(name, run, (run.reader, run.model), how) for name, run in self.retrained().items()]
        steps.sort(key=lambda step: _ORDER.index(type(step.run)) if step.run else len(_ORDER) - 1.5)
        for pattern in only:
            if not any(fnmatch(step.name, pattern) for step in steps):
                raise SettingsError(f"--only {pattern}: matches none of {', '.join(step.name for step in steps)}")
        wanted = {step.name for step in steps if _asked(step.name, only)}
        kept: list[Step] = []
        for step in reversed(steps):
            if step.name in wanted and (step.run is not None or _asked(step.name, only)):
                kept.append(step)
                wanted.update(step.needs)
        return kept[::-1]

    def _needs(self, name: str) -> tuple[str, ...]:
        run = self.runs[name]
        if isinstance(run, AdversarialRun):
            return run.extends, run.classifier
        if isinstance(run, GenerativeRun):
            return (run.extends,)
        if isinstance(run, EnsembleRun):
            return run.extends, *run.surrogates
        return ()


class Runner:
    """Does steps in a folder with one folder per run.

    Args:
        schedule: what belongs to what.
        runs: the folder.
        device: to train on.
        sets: opens a data set by name.
        bar: a progress bar of a name and a number of iterations.
    """

    def __init__(
        self,
        schedule: Schedule,
        runs: Path,
        device: Device,
        sets: Callable[[str], SmallSet],
        bar: Callable[[str, int], Any],
    ) -> None:
        self._schedule, self._runs, self._device, self._sets, self._bar = schedule, runs, device, sets, bar

    def done(self, step: Step) -> bool:
        """The step has been done by these settings.

        Raises:
            CheckpointError: it has been done by others.
        """
        final = self._runs / step.name / "final.pt"
        if step.run is not None:
            if not final.exists():
                return False
            if checkpoint.load(final)["run"] != described(step.run):
                raise checkpoint.CheckpointError(f"{final}: of a run with other settings; move it away to start anew")
            return True
        path = final.with_name(EVALUATION)
        if not path.exists() or path.stat().st_mtime < final.stat().st_mtime:
            return False
        told = json.loads(path.read_text())
        readers = self._schedule.classifiers(self._schedule.runs[step.name].data)
        wanted = self._schedule.purified(step.name)
        return set(told["recognition"]) >= set(readers) and ("psnr_purified" in told or not wanted)

    def begun(self, step: Step) -> bool:
        """The step was interrupted."""
        folder = self._runs / step.name
        return step.run is not None and (folder / "last.pt").exists() and not (folder / "final.pt").exists()

    def do(self, step: Step) -> None:
        """Train, or measure; goes on from the last checkpoint."""
        out = self._runs / step.name
        if step.run is not None:
            with self._bar(step.told, step.run.iterations) as advance:
                LOOPS[type(step.run)](step.run, self._sets(step.run.data), self._device, out, advance)
            return
        run = self._schedule.runs[step.name]
        base, purified = self._schedule.base(step.name), self._schedule.purified(step.name)
        readers = {}
        for name in self._schedule.classifiers(run.data):
            net, state = classifier_of(self._runs / name / "final.pt", self._device)
            readers[name] = Reader(net, state["recognition"])
        plain = csnet_of(self._runs / base / "final.pt", self._device)[0] if base and purified else None
        model = model_of(out / "final.pt", self._device)
        total = passes(len(readers), plain is not None, purified)
        with self._bar(step.told, total) as advance:
            count = iter(range(1, total + 1))
            result = measure_model(
                model, plain, self._sets(run.data).test, readers, purified, self._device,
                lambda: advance({"iteration": next(count)}),
            )  # fmt: skip
        partial = (out / EVALUATION).with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(out / EVALUATION)


def estimates(
    schedule: Schedule, steps: Sequence[Step], device: Device, sets: Callable[[str], SmallSet], bar: Callable[..., Any]
) -> Iterator[tuple[Step, float]]:
    """Each step with the seconds that it will take, by doing a few iterations of its like with untrained networks."""
    measured: dict[str, float] = {}

    def some(name: str) -> SmallSet:
        whole = sets(name)
        return dataclasses.replace(whole, train=whole.train[:_TRIED_TRAIN], test=whole.test[:_TRIED_TEST])

    with tempfile.TemporaryDirectory(prefix="veilcam-tried-") as folder:
        tried = Runner(schedule, Path(folder), device, some, bar)
        for step in steps:
            like = re.sub(r"-r\d+", "", step.told)
            needed_by_others = isinstance(step.run, SmallRun) and not isinstance(step.run, RetrainedRun)
            if like not in measured or needed_by_others:
                began = time.monotonic()
                tried.do(step if step.run is None else dataclasses.replace(step, run=_shortened(step.run)))
                took = time.monotonic() - began
                measured[like] = _whole(step, Path(folder), took, sets)
            yield step, measured[like]


def _shortened(run: SmallRun) -> SmallRun:
    changed: dict[str, Any] = {"iterations": _TRIED_ITERATIONS}
    if isinstance(run, RetrainedRun):
        changed["check_every"] = 2 * _TRIED_ITERATIONS
    return dataclasses.replace(run, **changed)


def _whole(step: Step, folder: Path, took: float, sets: Callable[[str], SmallSet]) -> float:
    if step.run is None:
        return took * len(sets("cifar10").test) / _TRIED_TEST
    rows = (folder / step.name / "log.csv").read_text().splitlines()
    return float(rows[-1].split(",")[-1]) / _TRIED_ITERATIONS * step.run.iterations


def _asked(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch(name, pattern) for pattern in only)
