"""Engines side by side on the same reconstructors: milliseconds for a picture, and against onnxruntime in float32."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from decoder.engines import REFERENCE, EngineError
from decoder.engines.choice import agreeing, times
from decoder.model import Model


def measure(forms: Mapping[str, Model], sizes: Sequence[tuple[int, int]], threads: int, rounds: int) -> dict[str, Any]:
    """Time every engine that is installed and agrees, all within one run.

    Args:
        forms: of a reconstructor, by precision.
        sizes: of pictures, height and width.
        threads: that an engine may use.
        rounds: in which each takes part once.

    Raises:
        EngineError: one that agrees fails at one of the sizes.
    """
    engines, tried = agreeing(forms, threads)
    told: dict[str, Any] = {
        name: {"agreement_db": each.agreement_db and round(each.agreement_db, 1), "problem": each.problem}
        for name, each in tried.items()
    }
    for name, engine in engines.items():
        told[name] |= {"device": engine.device, "precision": engine.precision, "sizes": {}}
    for height, width in sizes:
        took, problems = times(engines, (height, width), rounds)
        if problems:
            raise EngineError("; ".join(problems.values()))
        reference = np.array(took[REFERENCE])
        for name, milliseconds in took.items():
            told[name]["sizes"][f"{width}x{height}"] = {
                "median_ms": round(float(np.median(milliseconds)), 2),
                "least_ms": round(min(milliseconds), 2),
                # Round by round, so that what else the machine did falls out.
                "times_faster": round(float(np.median(reference / np.array(milliseconds))), 2),
            }
    return told
