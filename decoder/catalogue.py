"""The reconstructors that a server has, and which one is for whom."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoder.engines import Engine, EngineError, open_engine

SHIPPED = Path(__file__).parent / "reconstructors"
FORMAT_VERSION = "1"
RENDITIONS = ("veiled", "plain")


class CatalogueError(Exception):
    """Reconstructors that can't be served; the message names the file and what was expected."""


@dataclass(eq=False)
class Reconstructor:
    """One reconstructor file, open in an engine.

    Attributes:
        id: 16 hexadecimal digits of the SHA-256 of the file.
        rendition: ``veiled`` or ``plain``.
        operator_id: of the Φ that it was trained for.
        engine: it may be rebuilt.
        measured: what was measured of it when it was exported.
    """

    id: str
    name: str
    rendition: str
    operator_id: str
    engine: Engine
    measured: dict[str, Any]


class Catalogue:
    """All reconstructors of a server."""

    def __init__(self, reconstructors: Sequence[Reconstructor]) -> None:
        self.reconstructors = tuple(reconstructors)

    def operators(self) -> set[str]:
        """Ids of the operators whose measurements can be reconstructed."""
        return {each.operator_id for each in self.reconstructors}

    def block(self, operator_id: str) -> int:
        """Block side of an operator that the catalogue has."""
        return next(each.engine.block for each in self.reconstructors if each.operator_id == operator_id)

    def choose(self, operator_id: str, rendition: str, rows: int) -> Reconstructor | None:
        """The reconstructor that wastes least: the fewest rows that hold ``rows``, else the most there are."""
        fitting = [r for r in self.reconstructors if (r.operator_id, r.rendition) == (operator_id, rendition)]
        enough = [r for r in fitting if r.engine.rows >= rows]
        if enough:
            return min(enough, key=lambda r: r.engine.rows)
        return max(fitting, key=lambda r: r.engine.rows, default=None)


def load_catalogue(paths: Sequence[Path], engine: str, threads: int) -> Catalogue:
    """Open every reconstructor of the files and folders given.

    Raises:
        CatalogueError: nothing there, or a file that is no reconstructor.
        EngineError: the engine isn't there, or can't run a file.
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
    return Catalogue([_open(file, engine, threads) for file in files])


def _open(path: Path, engine: str, threads: int) -> Reconstructor:
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise CatalogueError(f"{path}: can't be read ({error.strerror})") from None
    try:
        opened = open_engine(engine, path, threads)
    except EngineError as error:
        raise CatalogueError(str(error)) from None
    fields = {key.removeprefix("veilcam."): value for key, value in opened.metadata.items()}
    if fields.get("format") != FORMAT_VERSION:
        raise CatalogueError(f"{path}: metadata veilcam.format is {fields.get('format')}, expected {FORMAT_VERSION}")
    if fields.get("rendition") not in RENDITIONS or not fields.get("operator_id"):
        raise CatalogueError(f"{path}: metadata veilcam.rendition and veilcam.operator_id: expected both")
    if opened.rows < 1 or opened.block < 2:
        raise CatalogueError(f"{path}: metadata veilcam.block, and a fixed number of rows: expected both")
    try:
        measured = json.loads(fields.get("measured", "{}"))
    except json.JSONDecodeError as error:
        raise CatalogueError(f"{path}: metadata veilcam.measured is not JSON ({error})") from None
    return Reconstructor(digest, path.stem, fields["rendition"], fields["operator_id"], opened, measured)


def fit_rows(levels: NDArray[np.int8], rows: int) -> NDArray[np.int8]:
    """As many rows as a reconstructor takes: rows not sent are zero, rows it doesn't know are left out."""
    if len(levels) >= rows:
        return levels[:rows]
    return np.concatenate([levels, np.zeros((rows - len(levels), *levels.shape[1:]), np.int8)])
