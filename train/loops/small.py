"""The table of loops that learn from small labelled sets, one file each."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from train import checkpoint
from train.data.small import open_set
from train.devices import find_device
from train.loops import adversarial, classifier, csnet, ensemble, generative, refined, retrained, steps
from train.loops.schedule import Report
from train.networks.classifiers import JUDGES
from train.settings import (
    AdversarialRun,
    ClassifierRun,
    CSNetRun,
    EnsembleRun,
    GenerativeRun,
    RefinedRun,
    RetrainedRun,
    Run,
    SettingsError,
    SmallRun,
    StepsRun,
)

log = logging.getLogger("veilcam.train")

LOOPS: Mapping[type[Run], Callable[..., Path]] = {
    ClassifierRun: classifier.train,
    CSNetRun: csnet.train,
    RefinedRun: refined.train,
    AdversarialRun: adversarial.train,
    GenerativeRun: generative.train,
    EnsembleRun: ensemble.train,
    StepsRun: steps.train,
    RetrainedRun: retrained.train,
}


def start(run: SmallRun, folders: Sequence[Path], cache: Path, out: Path, report: Report) -> Path:
    """Train by the settings of a run on CIFAR-10 or MNIST; returns the path of ``out/final.pt``.

    Finished runs that this one names lie beside it, a folder each.

    Raises:
        SettingsError: it would be made against a judge.
    """
    for name in run.against:
        if (path := out.parent / name / "final.pt").exists():
            network = checkpoint.load(path)["run"].get("network")
            if network in JUDGES:
                raise SettingsError(f"{name} is a judge, {network}, which no veil may be made against")
    data, device = open_set(run.data, folders, cache), find_device()
    log.info("on %s", device.told)
    return LOOPS[type(run)](run, data, device, out, report)
