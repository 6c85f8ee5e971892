"""Engines side by side on the same reconstructors: milliseconds for a picture, and against onnxruntime in float32."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.tables import table
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


def printed(name: str, told: dict[str, Any], threads: int, machine: dict[str, object]) -> Table:
    """Of one reconstructor, as ``measure`` told it."""
    sizes = list(told[REFERENCE]["sizes"])

    def cells(row: dict[str, Any]) -> list[str]:
        took = [row["sizes"][size] for size in sizes] if "sizes" in row else []
        agrees = "–" if row["agreement_db"] is None else f"{row['agreement_db']:.1f}"
        shown = [f"{each['median_ms']:.1f} ({each['times_faster']:.2f})" for each in took] or ["–"] * len(sizes)
        return [*shown, row["problem"] or agrees]

    title = f"{name}, {threads} threads, median ms (times faster)"
    columns = ("engine", *sizes, "dB to onnxruntime")
    return table(title, columns, ([engine, *cells(row)] for engine, row in told.items()), machine)
