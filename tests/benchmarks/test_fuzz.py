"""What fuzzing has found stays mended, and the run itself counts, finds and goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from benchmarks.fuzz_targets import TARGETS
from tests.benchmarks.test_benchmarks import CLI

FOUND = sorted((Path(__file__).parent / "found").glob("*/*"))


@pytest.mark.parametrize("found", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_gives_the_readers_own_error(found: Path, tmp_path: Path) -> None:
    TARGETS[found.parent.name].read(found.read_bytes(), tmp_path)


def test_every_target_has_a_round() -> None:
    assert tuple(TARGETS) == fuzz.TARGETS


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_seeds_give_the_readers_own_error(name: str, tmp_path: Path, data: st.DataObject) -> None:
    seed = bytearray(data.draw(st.sampled_from(TARGETS[name].seeds())))
    for _ in range(data.draw(st.integers(0, 4))):
        seed[data.draw(st.integers(0, len(seed) - 1))] = data.draw(st.integers(0, 255))
    TARGETS[name].read(bytes(seed[: data.draw(st.integers(0, len(seed)))]), tmp_path)


def test_a_run_goes_on_where_the_one_before_ended_and_sees_what_is_mended(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    kept = tmp_path / "fuzz.json"
    told = {"kind": "E", "error": "E: was here once", "place": "x", "input": "", "at": "", "mended": False}
    one = {"inputs": 500, "seconds": 1.0, "edges": 1, "corpus": 0, "findings": [told]}
    kept.write_text(json.dumps({"inputs": 500, "targets": {"payload": one}}))
    done = subprocess.run(
        [*CLI, "fuzz", "--inputs", "1500", "--work", str(tmp_path / "corpus"), "--json", str(kept)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    after = json.loads(kept.read_text())
    assert after["inputs"] >= 1500
    payload = after["targets"]["payload"]
    assert payload["inputs"] > 500
    assert payload["edges"] > 10
    assert payload["findings"][0]["mended"]
    assert list((tmp_path / "corpus" / "payload").iterdir())


def test_a_process_that_dies_is_a_finding(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    script = (
        "import os, sys\n"
        "from benchmarks import fuzz, fuzz_targets\n"
        "def die(data, folder):\n"
        "    if data[:1] == b'V': raise KeyError('found')\n"
        "    if data[:1] == b'W' and (folder / 'report.json').exists(): os.abort()\n"
        "seeds = lambda: [b'VCP', b'W']\n"
        "fuzz_targets.TARGETS['payload'] = fuzz_targets.Target(die, seeds)\n"
        "sys.exit(fuzz._main())\n"
    )
    folder, corpus = tmp_path / "folder", tmp_path / "corpus"
    folder.mkdir()
    corpus.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, "payload", str(corpus), str(folder), "10000"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(fuzz.__file__).parent.parent)},
    )
    assert done.returncode != 0
    assert [each["kind"] for each in json.loads((folder / "report.json").read_text())["findings"]] == ["KeyError"]
    assert list(folder.glob("crash-*"))


def test_a_file_that_is_no_state_is_told(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    done = subprocess.run([*CLI, "fuzz", "--json", str(tmp_path / "other.json")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected a file that this command has written" in done.stderr
