"""Fuzzing guided by coverage (atheris): millions of inputs for the readers of ``fuzz_targets.py``, round by round.

A round is one target in a process of its own, on the corpus that the rounds before have left. What it counts and finds
is added to one file after each round, so that a run goes on where one that was stopped has ended.
"""

import base64
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.tables import table

ROUND_INPUTS, ROUND_S = 100_000, 60.0
"""A round is over after so many inputs, or after so long."""
MEMORY_MB = 512
"""What a reader may take, above what its program has once it is loaded; beyond it is a finding."""
INPUT_S = 10
"""What one input may take."""
TARGETS = ("payload", "message", "segment", "operator", "settings", "users", "run")
"""Of ``fuzz_targets.py``, which is imported where it is watched, and not here."""
_LARGEST = 4096
_WATCHED = ["protos", "encoder", "decoder", "train", "benchmarks.fuzz_targets", "numpy.lib", "zipfile", "tomllib"]
_ROOT = Path(__file__).parent.parent


class FuzzError(Exception):
    """A round that couldn't run."""


def measure(inputs: int, work: Path, state: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Rounds of all targets in turn, until there were so many inputs in all.

    Args:
        inputs: counted with those of ``state``.
        work: folder for the corpus.
        state: what a run before has kept, or nothing; added to.
        keep: is given the state whenever there is something new.

    Raises:
        FuzzError: atheris isn't installed, or a round couldn't run.
    """
    state.setdefault("inputs", 0)
    targets = state.setdefault("targets", {})
    for name in TARGETS:
        told = targets.setdefault(name, {"inputs": 0, "seconds": 0.0, "edges": 0, "corpus": 0, "findings": []})
        for finding in told["findings"]:
            finding["mended"] = not _round(name, work, base64.b64decode(finding["input"]))["findings"]
    while state["inputs"] < inputs:
        for name in TARGETS:
            share = max(1000, (inputs - state["inputs"]) // len(TARGETS))
            told, came = targets[name], _round(name, work, inputs=min(share, ROUND_INPUTS))
            told["inputs"] += came["inputs"]
            told["seconds"] = round(told["seconds"] + came["seconds"], 1)
            told["edges"], told["corpus"] = max(told["edges"], came["edges"]), came["corpus"]
            for finding in came["findings"]:
                _add(told["findings"], finding)
            state["inputs"] = sum(each["inputs"] for each in targets.values())
            keep(state)
            if state["inputs"] >= inputs:
                return


def open_findings(state: dict[str, Any]) -> list[str]:
    """One line for each finding that isn't mended."""
    return [
        f"{name}: {finding['error']} ({finding['place']})"
        for name, told in state["targets"].items()
        for finding in told["findings"]
        if not finding["mended"]
    ]


def printed(state: dict[str, Any]) -> Iterator[Table]:
    """A row for each reader."""
    counts = ("inputs", "seconds", "edges", "corpus")
    rows = (
        (name, *(told[count] for count in counts), len(told["findings"]), sum(f["mended"] for f in told["findings"]))
        for name, told in state["targets"].items()
    )
    yield table(f"{state['inputs']} inputs", ("reader", *counts, "found", "mended"), rows, state["machine"])


def _add(findings: list[dict[str, Any]], finding: dict[str, Any]) -> None:
    """One of each kind: a finding that was mended and is there again is open again."""
    for known in findings:
        if (known["kind"], known["place"]) == (finding["kind"], finding["place"]):
            if known["mended"]:
                known.update(finding)
            return
    findings.append(finding)


def _round(name: str, work: Path, only: bytes | None = None, inputs: int = 1) -> dict[str, Any]:
    """One target in a process of its own: a single input, if there is one, or so many."""
    corpus = work / name
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made:  # noqa: S108
        folder = Path(made)
        if only is not None:
            (folder / "only").write_bytes(only)
        command = [sys.executable, "-m", "benchmarks.fuzz", name, str(corpus.absolute()), str(folder), str(inputs)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        began = time.monotonic()
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, errors="replace")
        report = folder / "report.json"
        came: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {"inputs": 0, "findings": []}
        hurt = [path.read_bytes() for kind in ("crash", "timeout", "oom") for path in folder.glob(f"{kind}-*")]
        if done.returncode and not hurt:
            raise FuzzError(f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no answer'}")
        came["findings"] += [_finding("the process", f"ended with {done.returncode}", "", each) for each in hurt]
    edges = re.findall(r" cov: (\d+)", done.stderr)
    seconds, kept = time.monotonic() - began, sum(1 for _ in corpus.iterdir())
    return came | {"seconds": seconds, "edges": int(edges[-1]) if edges else 0, "corpus": kept}


def _finding(kind: str, error: str, place: str, data: bytes) -> dict[str, Any]:
    at = datetime.now().astimezone().isoformat(" ", "seconds")
    told = {"kind": kind, "error": error, "place": place, "input": base64.b64encode(data).decode()}
    return told | {"at": at, "mended": False}


class _Round:
    """What one process counts and finds, and when it has had enough.

    Args:
        read: the target.
        folder: for its files and the report.
        most: inputs.
    """

    def __init__(self, read: Callable[[bytes, Path], None], folder: Path, most: int) -> None:
        self._read, self._folder, self._most = read, folder, most
        self._inputs, self._began = 0, time.monotonic()
        self._findings: dict[tuple[str, str], dict[str, Any]] = {}

    def one(self, data: bytes) -> None:
        """Read one input; the process ends with the last."""
        self.read(data)
        enough = self._inputs % 1000 == 0 and time.monotonic() - self._began > ROUND_S
        if self._inputs >= self._most or enough:
            self.report()
            sys.stderr.flush()
            os._exit(0)

    def read(self, data: bytes) -> None:
        """Read one input and keep what isn't the reader's own error, the shortest input of each kind."""
        self._inputs += 1
        try:
            self._read(data, self._folder)
        except Exception as error:  # noqa: BLE001 - whatever comes through is what is looked for
            last = traceback.extract_tb(error.__traceback__)[-1]
            kind, place = type(error).__name__, f"{Path(last.filename).name}, {last.name}"
            known = self._findings.get((kind, place))
            if known is None or len(base64.b64decode(known["input"])) > len(data):
                self._findings[kind, place] = _finding(kind, f"{kind}: {str(error)[:200]}", place, data)
                self.report()

    def report(self) -> None:
        """Write down how things stand."""
        told = {"inputs": self._inputs, "findings": list(self._findings.values())}
        (self._folder / "report.json").write_text(json.dumps(told))


def _main() -> None:
    """A round in this process: TARGET CORPUS FOLDER INPUTS."""
    name, corpus, folder, inputs = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    try:
        import atheris
    except ModuleNotFoundError:
        sys.exit("atheris is missing: pip install 'veilcam[fuzz]'")
    with atheris.instrument_imports(include=_WATCHED):
        from benchmarks.fuzz_targets import TARGETS as targets  # noqa: N811 - the other is their names
    warnings.simplefilter("error")  # a reader that warns says something that its user can't place
    target = targets[name]
    size = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10
    this = _Round(target.read, folder, inputs)
    if (folder / "only").exists():
        resource.setrlimit(resource.RLIMIT_AS, (size + (MEMORY_MB << 20), resource.RLIM_INFINITY))
        this.read((folder / "only").read_bytes())
        this.report()
        return
    seeds = folder / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(target.seeds()):
        (seeds / str(number)).write_bytes(seed)
    options = [f"-max_len={_LARGEST}", f"-timeout={INPUT_S}", "-rss_limit_mb=0", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus), str(seeds)], this.one)
    resource.setrlimit(resource.RLIMIT_AS, (size + (MEMORY_MB << 20), resource.RLIM_INFINITY))
    atheris.Fuzz()


if __name__ == "__main__":
    _main()
