"""Train a veiled G from a plain one, with Φ as it is.

picture ─▶ S ─▶ quantise ─┬─▶ G ─┬──────────────▶ reconstruction error, visibility
                          │      └─▶ a random way ─▶ each surrogate ─▶ must not read what it reads
                          └─▶ plain G, frozen          on the original
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from train import checkpoint
from train.data.photographs import Photographs
from train.loops.plain import network_of
from train.loops.schedule import Report, Training, descend, learning_rate, replaced
from train.networks.quarter import SCALE, Reconstructor
from train.objectives.reconstruction import psnr, squared_error
from train.objectives.veil import likeness, repetition, unreadable, visibility
from train.purifiers import random_way
from train.readers import SURROGATES, Surrogate, open_reader, read
from train.settings import SettingsError, VeilRun
from train.strength import STRONGEST, WEAKEST, set_strength

_VIEWS = (224, 320, 448)
"""Sides of the squares that are veiled. Readers look at 224 pixels of them, as of small and of large pictures:
a veil that was trained on small ones alone is averaged away in large ones."""


def train(
    run: VeilRun,
    folders: Sequence[Path],
    out: Path,
    finished: Path,
    report: Report,
    readers_folder: Path | None,
) -> Path:
    """Train by a run's settings, going on from ``out/last.pt`` if it is there; returns the path of ``out/final.pt``.

    Args:
        folders: of photographs to learn from; what a surrogate reads on each is its label.
        out: where checkpoint and log go.
        finished: where the runs that this one extends lie, a folder each.
        report: called with each row of the log.
        readers_folder: where surrogates' weights lie that no package has.
    """
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    base, _ = network_of(finished / run.extends / "final.pt")
    base.requires_grad_(False)
    net = _with_grain(base.reconstructor).requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    surrogates = {name: _surrogate(name, readers_folder) for name in run.readers}
    data = Photographs(folders, generator)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(run.average))  # type: ignore[no-untyped-call]
    optimiser = torch.optim.Adam(net.parameters(), lr=run.learning_rate)
    parts = {"net": net, "averaged": averaged, "optimiser": optimiser}
    with Training(run, parts, generator, out, report, finished=finished) as training:
        while training.running:
            side = _VIEWS[int(torch.randint(len(_VIEWS), (), generator=generator))]
            picture = data.views(max(2, round(run.batch * _VIEWS[0] / side)), side)
            terms, veiled, plain = _terms(run, net, base, surrogates, picture, generator)
            rate = learning_rate(training.iteration, run)
            descend(optimiser, sum(terms.values(), torch.zeros(())), rate)
            averaged.update_parameters(net)
            terms |= {"psnr": psnr(veiled.detach(), picture).mean(), "plain_psnr": psnr(plain, picture).mean()}
            training.advance(terms, rate)
    return training.finish(averaged.module)


def reconstructor_of(path: Path, finished: Path) -> tuple[Reconstructor, dict[str, Any]]:
    """The veiled G of a finished run, ready for inference, and the checkpoint it came from."""
    state = checkpoint.load(path)
    if state["run"].get("kind") != VeilRun.kind or "provenance" not in state:
        raise checkpoint.CheckpointError(f"{path}: expected the final checkpoint of a veil run, of photographs")
    if others := replaced(finished, state.get("needs", {})):
        problem = f"made from another {', '.join(others)} than is there now; move {path.parent} away to start anew"
        raise checkpoint.CheckpointError(f"{path}: {problem}")
    base, _ = network_of(finished / state["run"]["extends"] / "final.pt")
    net = _with_grain(base.reconstructor)
    try:
        net.load_state_dict(state["net"])
    except RuntimeError as error:
        problem = f"not the weights of a veil of {state['run']['extends']} ({error})"
        raise checkpoint.CheckpointError(f"{path}: {problem}") from None
    return net.eval(), state


def strengthened(name: str, strength: float, runs: Path) -> Path:
    """Write a finished veil made weaker or stronger; returns its path, ``runs/NAME-xSTRENGTH/final.pt``.

    It is measured and exported as what was trained is.

    Args:
        strength: ``WEAKEST`` to ``STRONGEST``; 1 is as it was trained.

    Raises:
        CheckpointError: not a finished veil run, or one that was made from another so.
        SettingsError: the strength is out of bounds, or the run that would be written is there.
    """
    if not WEAKEST <= strength <= STRONGEST:
        raise SettingsError(f"--by {strength}: expected {WEAKEST} to {STRONGEST}")
    if name != Path(name).name:
        raise SettingsError(f"{name}: expected the name of a run in {runs}")
    path = runs / name / "final.pt"
    veiled, state = reconstructor_of(path, runs)
    if "strength" in state:
        made = f"made {state['strength']} times as strong as it was trained"
        raise checkpoint.CheckpointError(f"{path}: {made}; name the run that was trained")
    base, _ = network_of(runs / state["run"]["extends"] / "final.pt")
    final = runs / f"{name}-x{strength}" / "final.pt"
    if final.exists():
        raise SettingsError(f"{final}: is there already")
    set_strength(veiled, _with_grain(base.reconstructor), veiled, strength)
    final.parent.mkdir(exist_ok=True)
    checkpoint.save(final, state | {"net": veiled.state_dict(), "strength": strength})
    return final


def _with_grain(plain: Reconstructor) -> Reconstructor:
    """The same reconstructor, with a random pattern that it doesn't use yet."""
    rows, area = plain.initial.in_channels, plain.block**2
    channels, blocks = plain.last.in_channels, len(plain.deep)
    net = Reconstructor(torch.zeros(rows, area), plain.steps.flatten(), channels, blocks, grain=True)
    net.load_state_dict(plain.state_dict(), strict=False)
    return net


def _terms(
    run: VeilRun,
    net: Reconstructor,
    base: nn.Module,
    surrogates: dict[str, Surrogate],
    picture: Tensor,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The terms of equation (4) by name, each times its weight, and the veiled and plain pictures."""
    with torch.no_grad():
        quantised = base.sampling(picture)  # type: ignore[operator]
        plain = base.reconstructor(quantised)  # type: ignore[operator]
        originals = {name: read(reader, picture) for name, reader in surrogates.items()}
    veiled = net(quantised)
    terms = {"reconstruction": run.alpha * squared_error(veiled, picture)}
    if run.visibility:
        terms["visibility"] = run.visibility * visibility(veiled, plain, picture)
    if run.repetition:
        repeated = repetition(veiled, plain, net.block) + repetition(veiled, plain, SCALE)
        terms["repetition"] = run.repetition * repeated
    seen = random_way(veiled.clamp(0, 1), net.block, generator)
    for name, reader in surrogates.items():
        middle, scores = read(reader, seen)
        original_middle, original_scores = originals[name]
        terms[name] = run.beta * unreadable(scores, original_scores.argmax(1))
        if run.gamma:
            terms[f"{name}_likeness"] = run.gamma * likeness(middle, original_middle)
    return terms, veiled, plain


def _surrogate(name: str, folder: Path | None) -> Surrogate:
    if name not in SURROGATES:
        raise SettingsError(f"readers: {name!r} is no surrogate, expected among {', '.join(SURROGATES)}")
    return cast(Surrogate, open_reader(name, folder))
