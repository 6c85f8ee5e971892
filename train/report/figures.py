"""The figures of docs/paper.md as PNG: pictures side by side, and accuracy against PSNR."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from train.data.small import Pictures, SmallSet
from train.devices import Device
from train.evaluation.small import ITSELF
from train.loops.schedule import fingerprints
from train.models import model_of, pictures_of
from train.networks.classifiers import PAPER
from train.report import printed
from train.report.printed import MODELS, RATIOS
from train.report.tables import mean_recognition

SHOWN = 10
_FIGURES = {
    "figure4": (
        "Figure 4: MNIST, r = 0.1",
        "mnist",
        {"mnist-csnet-r10": "CSNet", "mnist-adv-csnet-resnet-r10": "Adv-CSNet-ResNet"},
    ),
    "figure5": (
        "Figure 5: CIFAR-10, r = 0.1",
        "cifar10",
        {
            "csnet-r10": "CSNet",
            "adv-csnet-gamma0-r10": "Adv-CSNet, γ_D = 0",
            "adv-csnet-gamma1-r10": "Adv-CSNet, γ_D = 1",
            "adv-csnet-vgg-r10": "Adv-CSNet-VGG, logits",
            "adv-csnet-vgg-softmax-r10": "Adv-CSNet-VGG, softmax",
            "adv-csnet-e-r10": "Adv-CSNet-E",
            "adv-csnet-s-r10": "Adv-CSNet-S",
        },
    ),
}
_DPI = 150


Drawn = dict[str, Any]
"""A figure as the report's numbers tell of it: its title, file and schedule, and what it shows: ``runs``, by name their
fingerprints."""


def draw_pictures(
    schedule: str,
    told: dict[str, Any],
    runs: Path,
    sets: Callable[[str], SmallSet],
    device: Device,
    folder: Path,
    before: Sequence[Drawn],
) -> list[Drawn]:
    """Figures 4 and 5 of a schedule, as far as its models are told of.

    A figure of an earlier report stays while all that it shows is told of, and not all of that is here to be drawn.
    What was trained anew and isn't measured yet isn't what is told of, unless nothing was told before.

    Args:
        told: of the schedule's runs.
        runs: folder of those that are here.
        before: figures of an earlier report.
    """
    drawn = []
    known = _fingerprints(told)
    for name, (title, data, models) in _FIGURES.items():
        file = f"{name}-{schedule}.png"
        trained = [run for run in models if run in known and (runs / run / "final.pt").exists()]
        shown = {run: of for run, of in fingerprints(runs, trained).items() if of == known[run]}
        kept = next((figure for figure in before if figure["file"] == file), None)
        if kept is not None:
            holds = kept.get("runs", {}).items() <= known.items()
            if holds and (not shown or not kept.get("runs", {}).keys() <= shown.keys()):
                drawn.append(kept)
                continue
        if not shown:
            continue
        originals = sets(data).test[:SHOWN]
        rows = [("original", originals)]
        for run in shown:
            rows.append((models[run], pictures_of(model_of(runs / run / "final.pt", device), originals, device)))
        _grid(rows, title, folder / file)
        drawn.append({"title": f"{title}, {schedule} schedule", "file": file, "schedule": schedule, "runs": shown})
    return drawn


def draw_trade(schedule: str, told: dict[str, Any], folder: Path) -> list[Drawn]:
    """Recognition against PSNR of all models of a schedule, beside what the paper printed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    colours = {row: f"C{k}" for k, row in enumerate((*printed.PSNR, None))}
    markers: dict[str | None, int] = {}
    shown: list[str] = []
    for key, (title, printed_as) in MODELS.items():
        models = {name: told["models"][name] for r in RATIOS if (name := f"{key}-r{r}") in told["models"]}
        read = {name: mean_recognition(model, tuple(PAPER)) for name, model in models.items()}
        points = [(models[name]["psnr"][ITSELF], y) for name, y in read.items() if y is not None]
        if points:
            shown += [name for name, y in read.items() if y is not None]
            marker = "os^Dvp*X"[markers.setdefault(printed_as, 0)]
            markers[printed_as] += 1
            axes.plot(*zip(*points, strict=True), f"{marker}-", color=colours[printed_as], label=title)
    for row, fidelity in printed.PSNR.items():
        told_row = printed.RECOGNITION[row]
        axes.plot(fidelity, told_row, "x:", color=colours[row], alpha=0.6, label=f"{row}, printed")
    axes.axhline(10, color="gray", linewidth=0.8)
    axes.set_xlabel("PSNR, dB")
    axes.set_ylabel("recognition, mean of VGG-16 and ResNet-110, %")
    axes.legend(fontsize=6)
    if not shown:
        return []
    file = f"trade-{schedule}.png"
    figure.savefig(folder / file, dpi=_DPI, metadata={"Software": None})
    title = f"Recognition against PSNR, {schedule} schedule; the line is chance"
    known = _fingerprints(told)
    return [{"title": title, "file": file, "schedule": schedule, "runs": {name: known[name] for name in shown}}]


def _fingerprints(told: dict[str, Any]) -> dict[str, str]:
    """Of the models that are told of."""
    return {name: model["needs"][name] for name, model in told["models"].items()}


def _grid(rows: Sequence[tuple[str, Pictures]], title: str, path: Path) -> None:
    figure = Figure(figsize=(8, 0.85 * len(rows) + 0.3), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), SHOWN)
    for line, (told, pictures) in zip(axes, rows, strict=True):
        for place, picture in zip(line, torch.unbind(pictures.x[:, 0]), strict=True):
            place.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
        line[0].set_ylabel(told, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
