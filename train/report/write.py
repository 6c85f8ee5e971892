"""Write the report: docs/paper.json with every number, docs/paper.md from it, figures and logs in docs/paper."""

import json
from pathlib import Path

from train.data.small import SmallSet
from train.devices import Device
from train.report.collect import collect
from train.report.figures import draw_pictures, draw_trade
from train.report.tables import render
from train.reproduce import SCHEDULES

NUMBERS, PAGE, BESIDE = "paper.json", "paper.md", "paper"


def write(schedules: Path, runs: Path, docs: Path, sets: dict[str, SmallSet], device: Device) -> Path:
    """Write it from finished runs; returns the page's path.

    Args:
        schedules: folder of schedules' run files.
        runs: where they ran, RUNS/SCHEDULE/NAME.
        docs: where the report goes.
        sets: data sets whose pictures are drawn.
        device: draws them.
    """
    beside = docs / BESIDE
    beside.mkdir(parents=True, exist_ok=True)
    told = collect(schedules, runs, beside)
    figures = []
    for name in SCHEDULES:
        figures += draw_pictures(name, runs / name, sets, device, beside)
        figures += draw_trade(name, told[name], beside)
    paper = {"schedules": told, "figures": figures}
    (docs / NUMBERS).write_text(json.dumps(paper, indent=1) + "\n")
    (docs / PAGE).write_text(render(paper))
    return docs / PAGE
