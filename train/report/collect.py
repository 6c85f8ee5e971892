"""Gather what finished runs left into one plain structure, and lay their logs beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

from train import checkpoint
from train.loops.schedule import described
from train.reproduce import EVALUATION, SCHEDULES, Schedule
from train.settings import ClassifierRun, SmallRun


def collect(schedules: Path, runs: Path, logs: Path) -> dict[str, Any]:
    """What every finished run of every schedule gave, by schedule and name, as plain values.

    Args:
        schedules: folder of schedules' run files.
        runs: where they ran, RUNS/SCHEDULE/NAME.
        logs: where their logs are copied to, LOGS/SCHEDULE/NAME.csv.

    Raises:
        CheckpointError: a finished run has other settings than its run file.
    """
    gathered: dict[str, Any] = {}
    for name in SCHEDULES:
        schedule, folder = Schedule(schedules / name), runs / name
        told: dict[str, Any] = {"models": {}, "classifiers": {}, "retrained": {}}
        for run_name, run in schedule.runs.items():
            if (entry := _entry(run_name, run, name, folder / run_name, logs)) is None:
                continue
            if isinstance(run, ClassifierRun):
                told["classifiers"][run_name] = entry
            elif (folder / run_name / EVALUATION).exists():
                told["models"][run_name] = entry | json.loads((folder / run_name / EVALUATION).read_text())
        for run_name, cell in schedule.retrained().items():
            if (entry := _entry(run_name, cell, name, folder / run_name, logs)) is not None:
                told["retrained"][run_name] = entry
        gathered[name] = told
    return gathered


def _entry(name: str, run: SmallRun, schedule: str, folder: Path, logs: Path) -> dict[str, Any] | None:
    final = folder / "final.pt"
    if not final.exists():
        return None
    state = checkpoint.load(final)
    if state["run"] != described(run):
        raise checkpoint.CheckpointError(f"{final}: of a run with other settings than its run file")
    entry = {"run": state["run"], "trained": state["provenance"]}
    entry |= {key: state[key] for key in ("recognition", "iterations") if key in state}
    log = logs / schedule / f"{name}.csv"
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "log.csv", log)
    return entry
