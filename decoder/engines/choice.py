"""The fastest engine that agrees: every one that is installed runs the real model, side by side."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decoder.engines import ENGINES, REFERENCE, Engine, EngineError, open_engine
from decoder.model import Model, ModelError

AGREES_DB = 50.0
"""PSNR of an engine against the reference, at least, of files that don't say it themselves."""
_SLACK_DB = 1.0
"""How much farther from the reference an engine may be than a file says that it should be on its own sample: of
integers, as it was when their quality and veil were measured; of steps, as far as these may stray."""
_ROUNDS = 5
_PATIENCE_S = 10.0
"""After so long no further round begins: a decoder that takes seconds for a picture is told by one."""
_SIZE = (240, 320)


@dataclass(frozen=True)
class Tried:
    """One engine on one reconstructor.

    Attributes:
        milliseconds: median for a picture of 320×240; None if it wasn't timed.
        agreement_db: PSNR of its pictures against the reference's.
        problem: why it can't be taken; empty if it can.
    """

    name: str
    milliseconds: float | None = None
    agreement_db: float | None = None
    problem: str = ""

    def __str__(self) -> str:
        """A line of a table."""
        took = f"{self.milliseconds:.1f} ms" if self.milliseconds is not None else "–"
        agrees = f", {self.agreement_db:.1f} dB to {REFERENCE}" if self.agreement_db is not None else ""
        return f"{self.name}: {took}{agrees}{f': {self.problem}' if self.problem else ''}"


def fastest(forms: Mapping[str, Model], threads: int) -> tuple[Engine, list[Tried]]:
    """The fastest engine that agrees with the reference, and how each fared.

    Args:
        forms: of a reconstructor, by precision.
        threads: that an engine may use.

    Raises:
        EngineError: not even the reference runs.
    """
    engines, tried = agreeing(forms, threads)
    took, problems = times(engines, _SIZE, _ROUNDS, _PATIENCE_S)
    for name in engines:
        median = statistics.median(took[name]) if name in took else None
        tried[name] = Tried(name, median, tried[name].agreement_db, problems.get(name, ""))
    if REFERENCE in problems:
        raise EngineError(problems[REFERENCE])
    best = min(took, key=lambda name: tried[name].milliseconds or 0.0)
    return engines[best], list(tried.values())


def agreeing(forms: Mapping[str, Model], threads: int) -> tuple[dict[str, Engine], dict[str, Tried]]:
    """The engines that agree with the reference, and how all fared, not timed yet.

    Args:
        forms: of a reconstructor, by precision.
        threads: that an engine may use.

    Raises:
        EngineError: not even the reference runs.
    """
    reference = open_engine(REFERENCE, forms, threads)
    engines, tried = {REFERENCE: reference}, {REFERENCE: Tried(REFERENCE)}
    for name in ENGINES:
        if name == REFERENCE:
            continue
        try:
            engine = open_engine(name, forms, threads)
            tried[name] = _compared(engine, reference)
        except EngineError as error:
            tried[name] = Tried(name, problem=str(error))
            continue
        if not tried[name].problem:
            engines[name] = engine
    return engines, tried


def agreed(name: str, forms: Mapping[str, Model], threads: int) -> Engine:
    """One engine by its name, if it agrees with the reference.

    Args:
        name: in ``ENGINES``.
        forms: of a reconstructor, by precision.
        threads: that it may use.

    Raises:
        EngineError: it doesn't run, or doesn't agree.
    """
    engine = open_engine(name, forms, threads)
    if name != REFERENCE:
        tried = _compared(engine, open_engine(REFERENCE, forms, threads))
        if tried.problem:
            raise EngineError(f"engine {name}: {engine.model.path}: {tried.agreement_db:.1f} dB, {tried.problem}")
    return engine


def _compared(engine: Engine, reference: Engine) -> Tried:
    try:
        sampled = engine.model.sample()
    except ModelError as error:
        raise EngineError(str(error)) from None
    if sampled is None:
        measurements, least = _drawn(reference.model), AGREES_DB
    else:
        measurements, least = sampled[0], sampled[1] - _SLACK_DB
    ours, theirs = (each.reconstruct(measurements).astype(np.float64) for each in (engine, reference))
    agreement = float(10 * np.log10(255**2 / max(1e-9, float(((ours - theirs) ** 2).mean()))))
    problem = "" if agreement >= least else f"refused, expected {least:.1f} dB to {REFERENCE} and more"
    return Tried(engine.name, agreement_db=agreement, problem=problem)


def _drawn(model: Model) -> NDArray[np.int8]:
    """Measurements as they might be: a smooth first row, and ever smaller ones after it."""
    draw = np.random.default_rng(0)
    smooth = np.cumsum(draw.normal(0, 8, (2, 1, 16, 16)), 3)
    rest = draw.laplace(0, 20 / np.arange(1, model.rows)[None, :, None, None], (2, model.rows - 1, 16, 16))
    levels: NDArray[np.float64] = np.concatenate([smooth, rest], 1)
    return levels.clip(-127, 127).round().astype(np.int8)


def times(
    engines: Mapping[str, Engine], size: tuple[int, int], rounds: int, patience_s: float = math.inf
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each for one picture, in rounds in which all take part: a busy moment is everyone's.

    Args:
        size: of the picture, height and width in pixels.
        rounds: that count; one before them, in which engines compile and allocate, doesn't.
        patience_s: no further round begins after so many seconds, but one is made.

    Returns:
        By name, the milliseconds of those that ran, and why the others didn't.
    """
    took: dict[str, list[float]] = {name: [] for name in engines}
    problems: dict[str, str] = {}
    began = time.monotonic()
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() - began > patience_s:
            break
        for name, engine in engines.items():
            if name in problems:
                continue
            height, width = (-(-side // engine.block) for side in size)
            try:
                milliseconds = engine.timed(1, (height, width))
            except EngineError as error:
                problems[name] = str(error)
                del took[name]
                continue
            if number:
                took[name].append(milliseconds)
    return took, problems
