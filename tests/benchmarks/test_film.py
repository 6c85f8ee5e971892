"""What a film leaves of a veil: through the command, with the film that an export makes."""

import csv
import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.film import measure
from decoder.catalogue import Catalogue
from encoder.sampling import Operator
from tests.benchmarks.test_benchmarks import CLI
from train.data.labelled import labelled_pictures


def bright(pictures: torch.Tensor) -> torch.Tensor:
    """A reader that knows two classes: dark 0, bright 1."""
    mean = pictures.mean((1, 2, 3))
    return torch.stack([0.5 - mean, mean - 0.5], 1)


@pytest.fixture
def labelled(tmp_path: Path, photographs: list[NDArray[np.uint8]]) -> Path:
    """Two photographs, one of them made dark."""
    rows = [["file", "class_index"]]
    for number, picture in enumerate((photographs[0] // 4, 128 + photographs[1] // 2)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
        rows.append([f"{number}.png", str(number)])
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def test_what_is_shown_and_what_the_film_has_are_read(
    labelled: Path, operator: Operator, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = labelled_pictures(labelled)
    result = measure(items, {"bright": bright}, operator, 0.1, catalogue)
    assert result["pictures"] == 2
    assert result["names"] == {"veiled": "veil-r10", "plain": "plain-r10"}
    for rendition in ("veiled", "plain"):
        assert result["recognition"][rendition]["bright"] == {"shown": 100.0, "film": 100.0}
        shown, film = result["psnr"][rendition]["shown"], result["psnr"][rendition]["film"]
        assert abs(shown - film) < 1.5, "the film is close to what is shown"
        assert result["bytes_a_picture"][rendition] > 100
    assert result["psnr"]["plain"]["shown"] > result["psnr"]["veiled"]["shown"]

    machine = {"processor": "P", "cores": 1, "python": "3", "versions": {}, "commit": "c"}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "film.json").write_text(json.dumps(result | {"machine": machine}))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert "| veil-r10, in a film | " in report.document()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere", "--readers-folder", ".", "--readers", "light"], "nowhere"),
        (["LABELLED", "--readers-folder", ".", "--readers", "abacus"], "reader 'abacus': expected one of"),
    ],
)
def test_what_can_not_be_measured_is_one_line(arguments: list[str], problem: str, labelled: Path) -> None:
    given = [str(labelled) if each == "LABELLED" else each for each in arguments]
    done = subprocess.run([*CLI, "film", *given], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
