"""Photographs whose ImageNet class is known, for readers to be measured on."""

import csv
from dataclasses import dataclass
from pathlib import Path

from train.data.files import DataError
from train.data.photographs import picture_files

IMAGENETTE = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}
"""The ten classes of Imagenette by their WordNet ids, and their numbers among the thousand."""


@dataclass(frozen=True)
class Labelled:
    """One picture file and its class, 0..999."""

    path: Path
    label: int


def labelled_pictures(folder: Path) -> list[Labelled]:
    """Pictures of a folder with ``labels.csv`` (columns file, class_index), or of one folder per Imagenette class.

    Raises:
        DataError: neither is there, or the table is malformed.
    """
    table = folder / "labels.csv"
    if table.exists():
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        try:
            return [Labelled(folder / row["file"], int(row["class_index"])) for row in rows]
        except (KeyError, ValueError) as error:
            raise DataError(f"{table}: columns file and class_index expected ({error})") from None
    found = [
        Labelled(path, IMAGENETTE[path.parent.name]) for path in picture_files(folder) if path.parent.name in IMAGENETTE
    ]
    if not found:
        raise DataError(f"{folder}: neither labels.csv nor folders named by Imagenette's classes")
    return found
