"""Write the report: docs/paper.json with every number, docs/paper.md from it, figures and logs in docs/paper."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.checkpoint import CheckpointError, save_text
from train.data.small import SmallSet
from train.devices import Device
from train.loops.schedule import changed_settings, replaced
from train.report.collect import collect
from train.report.figures import Drawn, draw_pictures, draw_trade
from train.report.tables import render
from train.reproduce import SCHEDULES, Schedule

NUMBERS, PAGE, BESIDE = "paper.json", "paper.md", "paper"


def write(schedules: Path, runs: Path, docs: Path, sets: Callable[[str], SmallSet], device: Device) -> Path:
    """Write it from finished runs; returns the page's path.

    What an earlier report told of runs that aren't there stays where they still have a run file, with what has changed
    in that since, and which of the runs that they were made from or measured with are others now; and so does a figure
    that shows them.

    Args:
        schedules: folder of schedules' run files.
        runs: where they ran, RUNS/SCHEDULE/NAME.
        docs: where the report goes.
        sets: opens data sets whose pictures are drawn.
        device: draws them.

    Raises:
        CheckpointError: no run has finished there, or one doesn't fit its run file.
    """
    beside = docs / BESIDE
    plans = {name: Schedule(schedules / name) for name in SCHEDULES}
    told = collect(plans, runs)
    if not any(entries for schedule in told.values() for entries in schedule.values()):
        raise CheckpointError(f"{runs}: no run has finished there (veilcam-train reproduce)")
    beside.mkdir(parents=True, exist_ok=True)
    before = _told_before(docs / NUMBERS)
    figures: list[Drawn] = []
    for name, plan in plans.items():
        found = {run: entry for entries in told[name].values() for run, entry in entries.items()}
        _keep(told[name], before["schedules"].get(name, {}), plan, runs / name)
        for entries in told[name].values():
            _lay_logs({run for run, entry in entries.items() if entry is found.get(run)}, runs / name, beside / name)
        figures += draw_pictures(name, told[name], runs / name, sets, device, beside, before["figures"])
        figures += draw_trade(name, told[name], beside)
    paper = {"schedules": told, "figures": figures}
    # A kill or a full disk leaves what was there: of runs that are gone nothing else tells.
    save_text(docs / NUMBERS, json.dumps(paper, indent=1, ensure_ascii=False) + "\n")
    save_text(docs / PAGE, render(paper))
    return docs / PAGE


def _lay_logs(names: set[str], runs: Path, logs: Path) -> None:
    for name in names:
        if (log := runs / name / "log.csv").exists():
            logs.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, logs / f"{name}.csv")


def _keep(told: dict[str, Any], before: dict[str, Any], schedule: Schedule, runs: Path) -> None:
    """Add what an earlier report told of runs that aren't there, and how it differs from what would be told now."""
    settings = {**schedule.runs, **schedule.retrained()}
    for group, entries in before.items():
        for name, entry in entries.items():
            planned = name in settings and entry["run"]["kind"] == settings[name].kind
            if planned and (name not in told[group] or _read_before(told[group][name], entry)):
                changed = changed_settings(entry["run"], settings[name])
                elsewhere = {run for run in entry.get("others", []) if not (runs / run / "final.pt").exists()}
                others = sorted({*elsewhere, *replaced(runs, entry.get("needs", {}))})
                told[group][name] = {key: value for key, value in entry.items() if key not in ("changed", "others")}
                told[group][name] |= {"changed": changed} if changed else {}
                told[group][name] |= {"others": others} if others else {}
        told[group] = dict(sorted(told[group].items()))


def _read_before(entry: dict[str, Any], before: dict[str, Any]) -> bool:
    """No classifier has read its pictures, and an earlier report told what they read of them."""
    return entry.get("recognition") == {} and before.get("recognition") != {}


def _told_before(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {"schedules": {}, "figures": []}
    except ValueError:
        raise CheckpointError(f"{path}: not what the report wrote; move it away") from None
    return told
