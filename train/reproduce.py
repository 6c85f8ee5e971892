"""Everything behind the paper's tables, in the order in which one thing needs another, skipping what is done.

csnet ───────┬─▶ adversarial ───────────────┐
classifiers ─┼─▶ ensemble ──────────────────┼─▶ measure ─▶ retrained readers ─▶ (veilcam-train report)
             ├─▶ refined ─▶ guide ─▶ steps ─┤
             └─▶ generative ────────────────┘
"""

import dataclasses
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from train import checkpoint
from train.data.small import SmallSet
from train.devices import Device
from train.evaluation.small import CONTROLS, EVALUATION, ITSELF, PURIFIERS, Reader, measure_model, passes
from train.loops.schedule import fingerprints, replaced, same_settings
from train.loops.small import LOOPS
from train.loops.steps import not_carried
from train.models import made_by, reader_of
from train.networks.classifiers import CLASSIFIERS, JUDGES, PAPER
from train.settings import (
    MODEL,
    AdversarialRun,
    ClassifierRun,
    CSNetRun,
    GenerativeRun,
    Measurement,
    RefinedRun,
    RetrainedRun,
    Run,
    SettingsError,
    SmallRun,
    StepsRun,
    read_measurement,
    read_run,
)

log = logging.getLogger("veilcam.train")

RUN_FILES = Path(__file__).parent / "runs" / "paper"
SCHEDULES = ("reduced", "short", "full")
MEASUREMENT = "measurement.toml"

_TRIED_ITERATIONS, _MOST_TRIED = 8, 256
TRIED_S = 2.0
"""What some iterations must take longer than one, for their time to be told from how busy the machine is."""
_TRIED_TRAIN, _TRIED_TEST = 600, 250
_FIRST: tuple[type[SmallRun], ...] = (CSNetRun, ClassifierRun, AdversarialRun, GenerativeRun)
"""What the paper's tables are made of; classifiers before what they read, as a measurement needs them all."""
_FROM_NEW_WEIGHTS = {"scratch": True, "learning_rate": 0.1, "warm_up": 400}


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
        SettingsError: a file can't be used, or names what isn't there or doesn't fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MEASUREMENT).is_file():
            ships = ", ".join(SCHEDULES)
            raise SettingsError(f"{folder}: no schedule there, expected run files and {MEASUREMENT}, or one of {ships}")
        self.measurement: Measurement = read_measurement(folder / MEASUREMENT)
        self.runs: dict[str, SmallRun] = {}
        for path in sorted(folder.glob("*.toml")):
            if path.name != MEASUREMENT:
                run = read_run(path)
                if not isinstance(run, SmallRun):
                    raise SettingsError(f"{path}: a {run.kind} run has no place in a schedule")
                self.runs[path.stem] = run
        for asked in (self._unmet, self._unfit):  # what fits is asked where all is there
            for name in self.runs:
                if problem := next(asked(name), ""):
                    raise SettingsError(f"{folder / f'{name}.toml'}: {problem}")
        self._check_measurement()

    @property
    def models(self) -> list[str]:
        """Runs that give pictures."""
        return [name for name, run in self.runs.items() if run.gives_pictures]

    def classifiers(self, data: str) -> list[str]:
        """Classifier runs of a data set."""
        return [n for n, run in self.runs.items() if isinstance(run, ClassifierRun) and run.data == data]

    def looks_closely(self, classifier: str) -> bool:
        """Whether a classifier reads controls and purified pictures too: the paper's, judges and those retrained do."""
        run = self.runs[classifier]
        reported = isinstance(run, ClassifierRun) and run.network in (*PAPER, *JUDGES)
        return reported or classifier in self.measurement.readers

    def base(self, model: str) -> str | None:
        """The CSNet that a model extends."""
        return getattr(self.runs[model], "extends", None)

    def purified(self, model: str) -> bool:
        """Whether a model is measured beside controls and through purifiers."""
        return any(fnmatch(model, pattern) for pattern in self.measurement.purified)

    def beside(self, model: str) -> str | None:
        """The CSNet that a veiled model is measured with: its controls come from it."""
        return self.base(model) if self.purified(model) and self.runs[model].veils else None

    def retrained(self) -> dict[str, RetrainedRun]:
        """Readers retrained on models' pictures, by run name."""
        cells = {}
        for model in self.models:
            if not any(fnmatch(model, pattern) for pattern in self.measurement.retrained):
                continue
            data, iterations = self.runs[model].data, self.measurement.retrained_iterations
            for reader in self.measurement.readers:
                if self.runs[reader].data != data:
                    continue
                cell = RetrainedRun(data=data, reader=reader, model=model, iterations=iterations)
                cells[f"{reader}-retrained-on-{model}"] = cell
                if self.measurement.scratch:
                    anew: dict[str, Any] = _FROM_NEW_WEIGHTS
                    cells[f"{reader}-anew-on-{model}"] = dataclasses.replace(cell, **anew)
        return cells

    def measured_with(self, model: str) -> tuple[str, ...]:
        """Runs that a model's measurement is made from."""
        base = self.beside(model)
        return (model, *self.classifiers(self.runs[model].data), *([base] if base else []))

    def steps(self, only: Sequence[str] = ()) -> list[Step]:
        """All steps in order, or those of the runs that match a wildcard, with what they need.

        The paper's models come before ours, and a model is measured as soon as it can be, so that what takes hours
        tells of the paper's tables first; readers retrained to measure come last. A model that is asked for is measured
        too, which needs every classifier of its data set.

        Raises:
            SettingsError: a wildcard matches nothing, or runs need each other in a circle.
        """
        order, how = self._order(), self.folder / MEASUREMENT
        cells = self.retrained()
        steps: list[Step] = []
        trained: set[str] = set()
        unmeasured = {name: self.measured_with(name) for name in order if name in self.models}
        for name in order:
            steps.append(Step(name, self.runs[name], _names(self.runs[name]), self.folder / f"{name}.toml"))
            trained.add(name)
            for model in [model for model, needs in unmeasured.items() if trained.issuperset(needs)]:
                steps.append(Step(model, None, unmeasured.pop(model), how))
        steps += [Step(name, run, _names(run), how) for name, run in cells.items()]
        for pattern in only:
            if not any(fnmatch(step.name, pattern) for step in steps):
                raise SettingsError(f"--only {pattern}: no run is called so{_nearly(pattern, [*order, *cells])}")
        asked = {step.name for step in steps if not only or any(fnmatch(step.name, pattern) for pattern in only)}
        wanted, kept = set(asked), []
        for step in reversed(steps):
            if step.name in (asked if step.run is None else wanted):
                kept.append(step)
                wanted.update(step.needs)
        return kept[::-1]

    def _order(self) -> list[str]:
        """Runs, each after what it needs, and by kind as ``_FIRST`` has them."""
        order: list[str] = []
        ready: list[str] = []
        sorter = TopologicalSorter({name: _names(run) for name, run in self.runs.items()})
        try:
            sorter.prepare()
        except CycleError as error:
            raise SettingsError(f"{self.folder}: runs need each other: {' → '.join(error.args[1])}") from None
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=lambda name: (_rank(self.runs[name]), name))
            order.append(ready.pop(0))
            sorter.done(order[-1])
        return order

    def _unmet(self, name: str) -> Iterator[str]:
        """What a run needs and isn't there, or is something else."""
        run = self.runs[name]
        for needed, kind in run.needs:
            other = self.runs.get(needed)
            if other is None:
                yield f"needs {needed or 'a run that it does not name'}, which has no run file beside it"
            elif other.kind != kind and not (kind == MODEL and other.gives_pictures):
                yield f"{needed} is a {other.kind} run, expected a {kind}"
            elif other.data != run.data:
                yield f"{needed} is of {other.data}, expected {run.data}"

    def _unfit(self, name: str) -> Iterator[str]:
        """What a run needs and mustn't be made against, or can't be combined."""
        run = self.runs[name]
        for reader in run.against:
            other = self.runs.get(reader)
            if isinstance(other, ClassifierRun) and other.network in JUDGES:
                yield f"{reader} is a judge, {other.network}, which no veil may be made against"
        if isinstance(run, StepsRun):
            yield from self._unfit_for_steps(run)

    def _unfit_for_steps(self, run: StepsRun) -> Iterator[str]:
        """A refinement of another CSNet, a guide that learns from other pictures, what a decoder can't carry."""
        refined, guide = self.runs.get(run.refined), self.runs[run.guide]
        if isinstance(refined, RefinedRun) and refined.extends != run.extends:
            yield f"refined: {run.refined} refines {refined.extends}, expected {run.extends}"
        assert isinstance(guide, RetrainedRun)
        if guide.model != run.start:
            yield f"guide: {run.guide} learns from pictures of {guide.model}, expected {run.start}"
        for key, reader in (("guide", guide.reader), *(("surrogates", name) for name in run.surrogates)):
            classifier = self.runs[reader]
            assert isinstance(classifier, ClassifierRun)
            if problem := not_carried(CLASSIFIERS[classifier.network]().eval()):
                yield f"{key}: {reader} {problem}"

    def _check_measurement(self) -> None:
        file = self.folder / MEASUREMENT
        for reader in self.measurement.readers:
            if not isinstance(self.runs.get(reader), ClassifierRun):
                raise SettingsError(f"{file}: readers: {reader} is no classifier run beside it")
        for key in ("purified", "retrained"):
            for pattern in getattr(self.measurement, key):
                if not any(fnmatch(model, pattern) for model in self.models):
                    raise SettingsError(f"{file}: {key}: {pattern} matches none of {', '.join(self.models)}")


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
        self._readers: dict[str, Reader] = {}

    def done(self, step: Step) -> bool:
        """The step has been done, by these settings and with the runs that are there; a measurement, with all that is
        asked now.

        Raises:
            CheckpointError: it has been done by other settings, or with other runs.
        """
        if step.run is None:
            told = evaluated(self._schedule, self._runs, step.name)
            return told is not None and _has_all(told, self._schedule, step.name)
        return finished(self._runs, step.name, step.run) is not None

    def begun(self, step: Step) -> bool:
        """The step was interrupted."""
        folder = self._runs / step.name
        return step.run is not None and (folder / "last.pt").exists() and not (folder / "final.pt").exists()

    def do(self, step: Step) -> None:
        """Train, or measure; goes on from the last checkpoint."""
        if step.run is None:
            self._measure(step.name)
            return
        with self._bar(step.told, step.run.iterations) as advance:
            data = self._sets(step.run.data)
            LOOPS[type(step.run)](step.run, data, self._device, self._runs / step.name, advance)

    def _measure(self, name: str) -> None:
        needs = fingerprints(self._runs, self._schedule.measured_with(name))
        run, test = self._schedule.runs[name], self._sets(self._schedule.runs[name].data).test
        purified = self._schedule.purified(name)
        readers = {reader: self._reader(reader) for reader in self._schedule.classifiers(run.data)}
        base = self._schedule.beside(name)
        plain = made_by(self._runs / base / "final.pt", test, self._device) if base else None
        made = made_by(self._runs / name / "final.pt", test, self._device)
        total = passes(readers.values(), plain is not None, purified)
        with self._bar(f"measure {name}", total) as advance:
            count = iter(range(1, total + 1))
            result = measure_model(
                made,
                plain,
                test,
                readers,
                purified,
                self._device,
                lambda: advance({"iteration": next(count)}),
            )
        result["needs"] = needs
        checkpoint.save_text(self._runs / name / EVALUATION, json.dumps(result, indent=1) + "\n")

    def _reader(self, name: str) -> Reader:
        if name not in self._readers:
            path = self._runs / name / "final.pt"
            net, state = reader_of(path, self._device)
            self._readers[name] = Reader(net, state["recognition"], closely=self._schedule.looks_closely(name))
        return self._readers[name]


def _rank(run: SmallRun) -> int:
    return _FIRST.index(type(run)) if type(run) in _FIRST else len(_FIRST)


def _nearly(pattern: str, names: Sequence[str]) -> str:
    near = get_close_matches(pattern, names)
    return f", but {', '.join(near)}" if near else f"; there are {', '.join(names)}"


def _names(run: SmallRun) -> tuple[str, ...]:
    return tuple(name for name, _ in run.needs)


def finished(runs: Path, name: str, run: Run) -> dict[str, Any] | None:
    """The final checkpoint of a run, None if it hasn't finished.

    Raises:
        CheckpointError: of other settings, or made from other runs than are there now.
    """
    path = runs / name / "final.pt"
    if not path.exists():
        return None
    state = checkpoint.load(path)
    if not same_settings(state["run"], run):
        raise checkpoint.CheckpointError(f"{path}: of a run with other settings; move {path.parent} away to start anew")
    if others := replaced(runs, state.get("needs", {})):
        problem = f"made from other runs of {', '.join(others)} than are there now"
        raise checkpoint.CheckpointError(f"{path}: {problem}; move {path.parent} away to start anew")
    return state


def evaluated(schedule: Schedule, runs: Path, model: str) -> dict[str, Any] | None:
    """What was measured of a model, None if it wasn't with the runs that are there now.

    A surrogate that came since isn't missed: what one reads is in no table of CIFAR-10's. What has left the schedule
    isn't either.
    """
    path = runs / model / EVALUATION
    if not path.exists():
        return None
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return None
    made_from = told.get("needs", {})
    surrogates = [name for name in schedule.classifiers(schedule.runs[model].data) if not schedule.looks_closely(name)]
    needs = [name for name in schedule.measured_with(model) if name in made_from or name not in surrogates]
    if not all((runs / name / "final.pt").exists() for name in needs):
        return None
    return told if fingerprints(runs, needs) == {name: made_from.get(name) for name in needs} else None


def _has_all(told: Mapping[str, Any], schedule: Schedule, model: str) -> bool:
    """A measurement has all that the schedule, and this program, measure of the model now."""
    readers = {reader: table for reader, table in told["recognition"].items() if reader in schedule.runs}
    closely = {reader: table for reader, table in readers.items() if schedule.looks_closely(reader)}
    if not told.get("mapped_back", {}).keys() >= closely.keys():
        return False
    if not schedule.purified(model):
        return True
    rendered = schedule.beside(model) is None or told["psnr"].keys() >= set(CONTROLS)
    return rendered and all(table[ITSELF].keys() >= PURIFIERS.keys() for table in closely.values())


def estimates(
    schedule: Schedule,
    steps: Sequence[Step],
    todo: Sequence[Step],
    device: Device,
    sets: Callable[[str], SmallSet],
    bar: Callable[..., Any],
) -> Iterator[tuple[Step, float]]:
    """Each step with the seconds that it will take, by doing a few iterations of its like with untrained networks.

    Of steps that are done already (not in ``todo``) no more is done than others need; they take no time.
    """
    measured: dict[str, float] = {}
    making: dict[str, float] = {}
    made = {step.run.model for step in steps if isinstance(step.run, RetrainedRun) and step not in todo}
    needed = {name for step in todo for name in step.needs}
    for step in reversed(steps):
        if step.run is not None and step.name in needed:
            needed.update(step.needs)

    def some(name: str) -> SmallSet:
        whole = sets(name)
        return dataclasses.replace(whole, train=whole.train[:_TRIED_TRAIN], test=whole.test[:_TRIED_TEST])

    with tempfile.TemporaryDirectory(prefix="veilcam-tried-") as folder:
        tried = Runner(schedule, Path(folder), device, some, bar)

        def seconds(step: Step, iterations: int) -> float:
            began = time.monotonic()
            if step.run is None:
                tried.do(step)
            else:
                for left in (Path(folder) / step.name).glob("*.pt"):
                    left.unlink()
                tried.do(dataclasses.replace(step, run=_shortened(step.run, iterations)))
            return time.monotonic() - began

        def making_s(run: RetrainedRun) -> float:
            """Of all pictures that a reader learns from, if none before it had them made."""
            if run.model in made:
                return 0.0
            made.add(run.model)
            like, whole = _of_any_ratio(run.model), sets(run.data).train
            if like not in making:
                began, few = time.monotonic(), whole[:_TRIED_TEST]
                made_by(Path(folder) / run.model / "final.pt", few, device)
                making[like] = (time.monotonic() - began) * len(whole) / len(few)
            return making[like]

        for step in steps:
            like = _of_any_ratio(step.told)
            if step in todo and like not in measured:
                if step.run is None:
                    data = sets(schedule.runs[step.name].data)
                    measured[like] = seconds(step, 0) * len(data.test) / _TRIED_TEST
                else:
                    once = min(seconds(step, 1), seconds(step, 1))  # the first time may find all caches cold
                    count = _TRIED_ITERATIONS
                    while (longer := seconds(step, count) - once) < TRIED_S and count < _MOST_TRIED:
                        count *= 2
                    measured[like] = once + max(0.0, longer) / (count - 1) * (step.run.iterations - 1)
            elif step.run is not None and step.name in needed:
                seconds(step, 1)
            before = making_s(step.run) if step in todo and isinstance(step.run, RetrainedRun) else 0.0
            yield step, before + measured[like] if step in todo else 0.0


def _of_any_ratio(name: str) -> str:
    return re.sub(r"-r\d+", "", name)


def _shortened(run: SmallRun, iterations: int) -> SmallRun:
    changed: dict[str, Any] = {"iterations": iterations, "batch": min(run.batch, _TRIED_TRAIN // 2)}
    if isinstance(run, RetrainedRun):
        changed["check_every"] = 2 * _MOST_TRIED
    return dataclasses.replace(run, **changed)
