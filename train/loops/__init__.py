"""Loops: one file each, and the table of those that learn from small labelled sets."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.data.small import open_set
from train.devices import find_device
from train.loops import classifier
from train.loops.schedule import Report
from train.settings import ClassifierRun, Run

log = logging.getLogger("veilcam.train")

LOOPS: Mapping[type[Run], Callable[..., Path]] = {
    ClassifierRun: classifier.train,
}


def start(run: Any, folder: Path | None, cache: Path, out: Path, report: Report) -> Path:
    """Train by the settings of a run on CIFAR-10 or MNIST; returns the path of ``out/final.pt``.

    Runs that this one names lie beside it, a folder each.
    """
    data, device = open_set(run.data, folder, cache), find_device()
    log.info("on %s", device.told)
    return LOOPS[type(run)](run, data, device, out, report)
