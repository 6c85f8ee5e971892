"""Gather what finished runs left into one plain structure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.evaluation.small import ITSELF
from train.loops.schedule import THEN, fingerprints
from train.reproduce import Schedule, evaluated, finished
from train.settings import ClassifierRun


def collect(schedules: Mapping[str, Schedule], runs: Path) -> dict[str, Any]:
    """What every finished run of every schedule gave, by schedule and name, as plain values.

    Args:
        schedules: by name.
        runs: where they ran, RUNS/SCHEDULE/NAME.

    Raises:
        CheckpointError: a finished run has other settings than its run file, or was made from others than are there.
    """
    gathered: dict[str, Any] = {}
    for name, schedule in schedules.items():
        folder = runs / name
        told: dict[str, Any] = {"models": {}, "classifiers": {}, "retrained": {}}
        for run_name, run in {**schedule.runs, **schedule.retrained()}.items():
            state = finished(folder, run_name, run)
            if state is None:
                continue
            entry = {"run": state["run"], "trained": state["provenance"], "needs": state.get("needs", {})}
            entry |= {key: state[key] for key in ("recognition", "iterations", "landed") if key in state}
            if run.gives_pictures:
                evaluation = evaluated(schedule, folder, run_name) or _at_its_end(folder, run_name, state)
                if evaluation is None:
                    continue
                told["models"][run_name] = entry | evaluation | {"needs": entry["needs"] | evaluation["needs"]}
            else:
                told["classifiers" if isinstance(run, ClassifierRun) else "retrained"][run_name] = entry
        gathered[name] = told
    return gathered


def _at_its_end(folder: Path, name: str, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a CSNet told of its pictures when it ended, before any classifier read them, as an evaluation."""
    if "psnr" not in state:
        return None
    told: dict[str, Any] = {key: {ITSELF: state[key]} for key in ("psnr", "ssim")}
    by = {key: value.split(THEN)[-1] for key, value in state["provenance"].items()}
    return {**told, "recognition": {}, "measured": by, "needs": fingerprints(folder, [name])}
