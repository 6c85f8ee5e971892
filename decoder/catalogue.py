"""The reconstructors that a server has, and which one is for whom."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoder.admission import check_sides
from decoder.engines import Engine
from decoder.engines.choice import agreed, fastest
from decoder.model import RENDITIONS, Model, ModelError, read_model
from decoder.sums import SHIPPED as SHIPPED
from decoder.sums import SUMS, SumsError, read_sums
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.decode")


class CatalogueError(Exception):
    """Reconstructors that can't be served; the message names the file and what was expected."""


@dataclass(eq=False)
class Reconstructor:
    """One reconstructor file, open in an engine.

    Attributes:
        id: 16 hexadecimal digits of the SHA-256 of its float32 file, whichever form runs.
        rendition: ``veiled`` or ``plain``.
        operator_id: of the Φ that it was trained for.
        engine: it may be rebuilt.
        measured: what was measured of it when it was exported.
        measured_form: what was measured of the form that runs when that was quantised; empty for float32.
    """

    id: str
    name: str
    rendition: str
    operator_id: str
    engine: Engine
    measured: dict[str, Any]
    measured_form: dict[str, Any]


class Catalogue:
    """All reconstructors of a server."""

    def __init__(self, reconstructors: Sequence[Reconstructor]) -> None:
        self.reconstructors = tuple(reconstructors)

    def operators(self) -> set[str]:
        """Ids of the operators whose measurements can be reconstructed."""
        return {each.operator_id for each in self.reconstructors}

    def block(self, operator_id: str) -> int:
        """Block side of an operator that the catalogue has.

        Raises:
            KeyError: it hasn't, or no more: others may be in its reconstructors' place since it was asked.
        """
        return {each.operator_id: each.engine.block for each in self.reconstructors}[operator_id]

    def check_sides(self, hello: pb.Hello) -> None:
        """Refuse pictures that are too large for an engine for their operator, which the catalogue has.

        What an engine took, as a camera's or in a recording, may be too large for the one in its place.

        Raises:
            Refusal: it names the sides.
        """
        engines = [each.engine for each in self.reconstructors if each.operator_id == hello.operator_id]
        check_sides(hello, engines[0].block, min(engine.most_blocks for engine in engines))

    def choose(self, operator_id: str, rendition: str, rows: int) -> Reconstructor | None:
        """The reconstructor that wastes least: the fewest rows that hold ``rows``, else the most there are."""
        fitting = [r for r in self.reconstructors if (r.operator_id, r.rendition) == (operator_id, rendition)]
        enough = [r for r in fitting if r.engine.rows >= rows]
        if enough:
            return min(enough, key=lambda r: r.engine.rows)
        return max(fitting, key=lambda r: r.engine.rows, default=None)


def load_catalogue(
    paths: Sequence[Path], engine: str, threads: int, renditions: Collection[str] = RENDITIONS
) -> Catalogue:
    """Open the reconstructors of the files and folders given.

    Args:
        paths: integer forms stand beside the float32 files that they came from.
        engine: one of ``decoder.engines.ENGINES``; ``auto`` for the fastest that agrees.
        threads: that each may use.
        renditions: reconstructors of others are checked, and left out.

    Raises:
        CatalogueError: nothing there, a file that is no reconstructor, or two that would serve the same measurements.
        EngineError: the engine isn't there, can't run a file, or gives other pictures than the reference.
    """
    wanted = [forms for forms in read_forms(paths) if forms["float32"].told["rendition"] in renditions]
    served: dict[tuple[str, str, int], Path] = {}
    for model in (forms["float32"] for forms in wanted):
        rendition, operator_id = model.told["rendition"], model.told["operator_id"]
        other = served.setdefault((rendition, operator_id, model.rows), model.path)
        if other != model.path:
            alike = f"a {rendition} reconstructor of {model.rows} rows for operator {operator_id}"
            raise CatalogueError(f"{other} and {model.path}: each is {alike}; name the one to be used")
    return Catalogue([_open(forms, engine, threads) for forms in wanted])


def read_forms(paths: Sequence[Path]) -> list[dict[str, Model]]:
    """Reconstructors of the files and folders given, each in its forms by precision.

    Raises:
        CatalogueError: nothing there, a file that is no reconstructor, or a form without its float32 file.
    """
    files: list[Path] = []
    for path in paths:
        try:
            found = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
            there = bool(found) and found[0].is_file()
        except OSError as error:
            raise CatalogueError(f"{path}: can't be read ({error.strerror})") from None
        if not there:
            raise CatalogueError(f"{path}: no reconstructor (*.onnx) there")
        files += found
        try:
            listed = read_sums(path) if path.is_dir() else None
        except SumsError as error:
            raise CatalogueError(str(error)) from None
        for name in listed or ():
            if not (path / name).exists():
                raise CatalogueError(f"{path / name}: not there, and the {SUMS} beside it names it")
    try:
        models = [read_model(file) for file in files]
    except ModelError as error:
        raise CatalogueError(str(error)) from None
    forms = {model.id: {model.precision: model} for model in models if model.precision == "float32"}
    for model in models:
        if model.of not in forms:
            raise CatalogueError(f"{model.path}: is {model.precision} of {model.of}, which isn't among the files given")
        base = forms[model.of]["float32"]
        if (model.rows, model.block) != (base.rows, base.block):
            told = f"{model.rows} rows of blocks of {model.block}, {base.path} has {base.rows} and {base.block}"
            raise CatalogueError(f"{model.path}: {told}")
        forms[model.of][model.precision] = model
    return list(forms.values())


def _open(forms: Mapping[str, Model], engine: str, threads: int) -> Reconstructor:
    model = forms["float32"]
    measured = _measured(model, "measured")
    measured_forms = {precision: _measured(form, "quantised") for precision, form in forms.items()}
    if engine == "auto":
        log.info("%s: trying the engines that are installed", model.path.stem)
        opened, tried = fastest(forms, threads)
        apart: dict[str, list[str]] = {}
        for each in tried:
            if each.problem and each.milliseconds is None and each.agreement_db is None:
                apart.setdefault(each.problem, []).append(each.name)
                continue
            log.info("%s at 320×240, %s%s", model.path.stem, each, ", taken" if each.name == opened.name else "")
        for problem, names in apart.items():
            log.info("%s, not run: %s: %s", model.path.stem, ", ".join(names), problem)
    else:
        opened = agreed(engine, forms, threads)
    told = model.told
    return Reconstructor(
        *(model.id, model.path.stem, told["rendition"], told["operator_id"], opened),
        *(measured, measured_forms[opened.model.precision]),
    )


def _measured(model: Model, key: str) -> dict[str, Any]:
    try:
        measured = json.loads(model.told.get(key, "{}"))
    except json.JSONDecodeError as error:
        raise CatalogueError(f"{model.path}: metadata veilcam.{key} is not JSON ({error})") from None
    if not isinstance(measured, dict):
        raise CatalogueError(f"{model.path}: metadata veilcam.{key} is {measured!r:.40}, expected a JSON object")
    return measured


def fit_rows(levels: NDArray[np.int8], rows: int) -> NDArray[np.int8]:
    """As many rows as a reconstructor takes: rows not sent are zero, rows it doesn't know are left out."""
    if len(levels) >= rows:
        return levels[:rows]
    return np.concatenate([levels, np.zeros((rows - len(levels), *levels.shape[1:]), np.int8)])
