"""Write the report: docs/paper.json with every number, docs/paper.md from it, figures and logs in docs/paper."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.checkpoint import CheckpointError
from train.data.small import SmallSet
from train.devices import Device
from train.report.collect import collect
from train.report.figures import draw_pictures, draw_trade
from train.report.tables import render
from train.reproduce import SCHEDULES

NUMBERS, PAGE, BESIDE = "paper.json", "paper.md", "paper"


def write(schedules: Path, runs: Path, docs: Path, sets: Callable[[str], SmallSet], device: Device) -> Path:
    """Write it from finished runs; returns the page's path. A schedule that didn't run here keeps what was told of it.

    Args:
        schedules: folder of schedules' run files.
        runs: where they ran, RUNS/SCHEDULE/NAME.
        docs: where the report goes.
        sets: opens data sets whose pictures are drawn.
        device: draws them.

    Raises:
        CheckpointError: nothing has been measured there, or a run doesn't fit its run file.
    """
    beside = docs / BESIDE
    told = collect(schedules, runs, beside)
    if not any(schedule["models"] for schedule in told.values()):
        raise CheckpointError(f"{runs}: no model was trained and measured there (veilcam-train reproduce)")
    beside.mkdir(parents=True, exist_ok=True)
    before = _told_before(docs / NUMBERS)
    figures: list[dict[str, str]] = []
    for name in SCHEDULES:
        if told[name]["models"]:
            figures += draw_pictures(name, runs / name, sets, device, beside)
            figures += draw_trade(name, told[name], beside)
        elif name in before["schedules"]:
            told[name] = before["schedules"][name]
            figures += [figure for figure in before["figures"] if figure["schedule"] == name]
    paper = {"schedules": told, "figures": figures}
    (docs / NUMBERS).write_text(json.dumps(paper, indent=1, ensure_ascii=False) + "\n")
    (docs / PAGE).write_text(render(paper))
    return docs / PAGE


def _told_before(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {"schedules": {}, "figures": []}
    except ValueError:
        raise CheckpointError(f"{path}: not what the report wrote; move it away") from None
    return told
