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
CLASSES = 1000


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
        try:
            with table.open(newline="", encoding="utf-8") as file:
                rows = [(row["file"], int(row["class_index"])) for row in csv.DictReader(file)]
        except OSError as error:
            raise DataError(f"{table}: can't be read ({error.strerror})") from None
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise DataError(f"{table}: columns file and class_index expected ({error})") from None
        if not rows:
            raise DataError(f"{table}: no pictures in it")
        if not all(name for name, _ in rows):
            raise DataError(f"{table}: a row without a file")
        labelled = [Labelled(folder / name, label) for name, label in rows]
        if wrong := [each for each in labelled if not 0 <= each.label < CLASSES]:
            problem = f"class_index {wrong[0].label} of {wrong[0].path.name}, expected 0 to {CLASSES - 1}"
            raise DataError(f"{table}: {problem}")
        return labelled
    found = [
        Labelled(path, IMAGENETTE[path.parent.name]) for path in picture_files(folder) if path.parent.name in IMAGENETTE
    ]
    if not found:
        raise DataError(f"{folder}: neither labels.csv nor folders named by Imagenette's classes")
    return found
