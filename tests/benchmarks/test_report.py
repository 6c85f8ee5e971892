"""The page of measured figures says what the raw results hold, and nothing of what wasn't measured."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import report
from tests.benchmarks.test_benchmarks import CLI


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Raw results that are there: none yet."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_what_was_not_measured_has_no_section(folder: Path) -> None:
    headings = [line for line in report.document().splitlines() if line.startswith("## ")]
    assert headings == ["## Quality", "## What readers read of veil-r10", "## Integer forms of reconstructors"]


def test_a_veil_is_told_by_its_strengths_beside_the_plain_picture_and_itself(folder: Path) -> None:
    (veil,) = report.veils()
    for strength, psnr, read in ((1.25, 26.0, 8.0), (0.5, 28.2, 31.0)):
        ways = {"as is": read, "JPEG 75": read + 1, "notch": read + 2}
        told = {
            "psnr": {"veiled": psnr},
            "recognition": {reader: {"veiled": ways} for reader in veil.measured["recognition"]},
            "trained_against": veil.measured["trained_against"],
            "strength": strength,
            "measured": {"commit": "c", "processor": "P"},
        }
        (folder / f"strength-veil-r10-x{strength}.json").write_text(json.dumps(told))
    page = report.document()
    lines = page[page.index("## veil-r10 made weaker and stronger") :].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.endswith("| shipped |") or "strength-" in line]
    assert [row[0] for row in rows] == ["0", "0.5", "1", "1.25"]
    fidelity = veil.measured["psnr"]
    assert [row[1] for row in rows] == [f"{fidelity['plain']:.2f}", "28.20", f"{fidelity['veiled']:.2f}", "26.00"]
    readers = len(veil.measured["recognition"])
    assert rows[3][2:-1] == ["8.0"] * readers + ["8.0", "9.0", "10.0"], "each as is, and the judges' mean in each way"


def test_a_process_that_died_and_a_disk_that_was_not_full_are_told(folder: Path) -> None:
    told = {
        "size": [320, 240],
        "frame_rate": 15,
        "minutes": 60.0,
        "bounds": {"threads": [1.0, 4.0]},
        "small_disk": "only root can",
        "start": {"stuck": {"threads": 5.0}},
        "end": {},
        "counts": {f"veilcam_{name}_total": 1.0 for name in report.COUNTED},
        "problems": ["stuck: there is none any more at the end"],
        "samples": [],
        "machine": {"processor": "P", "cores": 1, "python": "3", "versions": {}, "commit": "c"},
    }
    (folder / "soak.json").write_text(json.dumps(told))
    page = report.document()
    assert "| camera that hangs: threads | 5 | gone | 9 |" in page
    assert "(but no full disk, since only root can)" in page
    assert "Grown or out of order: stuck: there is none any more at the end." in page


def test_a_bad_network_is_told_with_what_the_camera_said(folder: Path) -> None:
    arguments = ["network", "--fault", "half-open", "--fault", "cut for 1 s", "--json", str(folder / "network.json")]
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=200)
    told = json.loads((folder / "network.json").read_text())
    assert done.returncode == (1 if told["problems"] else 0), done.stderr
    rows = {row["fault"]: row for row in told["rows"]}
    assert set(rows) == {"half-open", "cut for 1 s"}
    assert rows["cut for 1 s"]["during"] == {}, "nothing came meanwhile"
    page = report.document()
    for name, row in rows.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {row['flows_again_s']} | {row['as_before_s']} |" in line
        assert " newer frame" in line or " server away" in line or " stopped" in line
        assert all(said in line for said in row["said"])
    assert "frames flow again" in next(line for line in page.splitlines() if line.startswith("| half-open |"))
    rows["half-open"]["flows_again_s"] = rows["half-open"]["as_before_s"] = None
    (folder / "network.json").write_text(json.dumps(told))
    assert "| half-open | never | never |" in report.document()


def test_kills_and_fuzzing_are_told(folder: Path) -> None:
    results = report.ROOT / "benchmarks" / "results"
    for name in ("kills.json", "fuzz.json"):
        (folder / name).write_bytes((results / name).read_bytes())
    kills, fuzz = (json.loads((folder / name).read_text()) for name in ("kills.json", "fuzz.json"))
    page = report.document()
    assert f"| kills of the server | {kills['kills']['server']} |" in page
    assert f"| frames **lost** | {kills['lost']} |" in page
    assert f"worst {kills['first_picture_s']['worst']} |" in page
    reader = fuzz["targets"]["operator"]
    assert f"| operator | {reader['inputs']} | {len(reader['findings'])} |" in page
    assert f"| all | {fuzz['inputs']} |" in page
