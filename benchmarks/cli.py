"""veilcam-bench: measure quality and latency of what is installed, and run the demo.

Exit codes: 0 done; 1 it broke on the way; 2 what was asked for can't be done.
"""

import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.progress import Progress

from benchmarks.machine import described

log = logging.getLogger("veilcam.bench")

BROKE = 1
UNUSABLE = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False)

Json = Annotated[Path | None, typer.Option("--json", help="write the figures to this file")]
Ratio = Annotated[float, typer.Option(help="sampling ratio r")]
Rendition = Annotated[str, typer.Option(help="plain or veiled")]
OperatorFile = Annotated[Path | None, typer.Option("--operator", help="operator file [the shipped one]")]
Reconstructors = Annotated[
    list[Path] | None, typer.Option("--reconstructor", help="reconstructor files or folders [the shipped ones]")
]
Engine = Annotated[str, typer.Option(help="runtime of the reconstructor")]
Threads = Annotated[int, typer.Option(min=1, help="threads of the engine [all cores]")]
_CORES = os.cpu_count() or 1
_LINE = 500
"""Characters of a result's file."""


def main() -> None:
    """Entry point of the command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("veilcam.decode", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        import onnxruntime  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        _unusable(f"{error.name} is missing: pip install 'veilcam[decoder]'")
    app()


@app.command()
def quality(
    folder: Annotated[Path, typer.Argument(help="folder of pictures")],
    ratio: Ratio = 0.1,
    rendition: Rendition = "plain",
    operator: OperatorFile = None,
    reconstructor: Reconstructors = None,
    engine: Engine = "onnxruntime",
    threads: Threads = _CORES,
    json_file: Json = None,
) -> None:
    """PSNR, SSIM and bits per pixel of whole pictures through sampling, payload and engine."""
    from benchmarks.quality import measure, printed

    _check_writable(json_file)
    machine = described()
    with _mistakes_told():
        catalogue, phi, _ = _loaded(reconstructor, operator, engine, threads)
        result = measure(folder, phi, ratio, catalogue, rendition)
    _show(result | {"machine": machine}, printed, json_file)


@app.command()
def latency(
    source: Annotated[str, typer.Option(help="video file, or any other source that ends")],
    ratio: Ratio = 0.1,
    operator: OperatorFile = None,
    reconstructor: Reconstructors = None,
    engine: Engine = "onnxruntime",
    threads: Threads = _CORES,
    json_file: Json = None,
) -> None:
    """Time of each stage from capture to a viewer at the source's own pace, and frames a second at full speed."""
    from benchmarks.latency import LatencyError, measure, printed

    _check_writable(json_file)
    machine = described()
    with _mistakes_told(LatencyError):
        catalogue, _, path = _loaded(reconstructor, operator, engine, threads)
        result = measure(source, path, ratio, catalogue)
    taken = ", ".join(sorted({each.engine.name for each in catalogue.reconstructors if each.rendition == "veiled"}))
    _show(result | {"engine": {"name": taken, "threads": threads}, "machine": machine}, printed, json_file)


@app.command()
def engines(
    reconstructor: Reconstructors = None,
    size: Annotated[list[str], typer.Option(help="WIDTHxHEIGHT; may be repeated")] = ["640x480", "1920x1088"],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="in which each engine takes part once")] = 9,
    threads: Threads = _CORES,
    json_file: Json = None,
) -> None:
    """Milliseconds of every engine that is installed, side by side on the same reconstructors."""
    from benchmarks.engines import measure, printed
    from decoder.catalogue import SHIPPED, read_forms

    _check_writable(json_file)
    machine, sizes = described(), [_size(each) for each in size]
    measured: dict[str, Any] = {}
    with _mistakes_told():
        for forms in read_forms(reconstructor or [SHIPPED]):
            name = forms["float32"].path.stem
            measured[name] = measure(forms, sizes, threads, rounds)
            console.print(printed(name, measured[name], threads, machine))
    _write(json_file, {"threads": threads, "rounds": rounds, "machine": machine, "reconstructors": measured})


@app.command()
def serve(
    cameras: Annotated[list[int], typer.Option(min=1, help="cameras at one time; may be repeated")] = [1, 2, 4, 8, 16],  # noqa: B006
    viewers: Annotated[list[int], typer.Option(min=0, help="of one camera; may be repeated")] = [0, 1, 10, 100],  # noqa: B006
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of each camera")] = "640x480",
    frame_rate: Annotated[float, typer.Option(min=0.1, help="frames a second of each camera")] = 10.0,
    seconds: Annotated[float, typer.Option(min=1, help="of each measurement")] = 20.0,
    engine: Annotated[str, typer.Option(help="as for veilcam-decode")] = "auto",
    json_file: Json = None,
) -> None:
    """A service with more and more cameras, each a process on this machine, then one with more and more viewers."""
    from benchmarks.processes import ProcessError
    from benchmarks.serve import measure, printed

    _check_writable(json_file)
    _size(size)
    machine = described()
    pairs = [*((each, 1) for each in cameras), *((1, each) for each in viewers if each != 1)]
    with _mistakes_told(ProcessError):
        rows = [measure(count, size, frame_rate, seconds, watching, engine) for count, watching in pairs]
    result = {"size": size, "frame_rate": frame_rate, "seconds": seconds, "rows": rows, "machine": machine}
    _show(result, printed, json_file)


@app.command()
def faults(
    damaged: Annotated[int, typer.Option(min=0, help="damaged messages among sound ones")] = 1000,
    connects: Annotated[int, typer.Option(min=0, help="connections that come and go")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="of each phase that lasts by the clock")] = 10.0,
    seed: Annotated[int, typer.Option(help="of what is damaged, and how")] = 0,
    json_file: Json = None,
) -> None:
    """A service while messages are damaged, connections come and go, an engine raises and viewers don't read.

    Ends with 1 if the service died, something waited without end, or what is sound was no longer shown.
    """
    try:
        from benchmarks.faults import measure, printed
    except ModuleNotFoundError as error:
        _unusable(f"{error.name} is missing: pip install 'veilcam[train]'")
    from benchmarks.processes import ProcessError

    _check_writable(json_file)
    machine = described()
    with _mistakes_told(ProcessError):
        result = measure(damaged, connects, seconds, seed, log.info)
    _show(result | {"machine": machine}, printed, json_file)


@app.command()
def film(
    pictures: Annotated[list[Path], typer.Argument(help="folders of labelled photographs, as `evaluate` takes them")],
    readers_folder: Annotated[Path, typer.Option(help="where readers' weights lie that no package has")],
    readers: Annotated[str, typer.Option(help="classifiers, comma-separated")],
    count: Annotated[int, typer.Option(min=1, help="photographs at most, drawn from all")] = 300,
    ratio: Ratio = 0.1,
    operator: OperatorFile = None,
    reconstructor: Reconstructors = None,
    json_file: Json = None,
) -> None:
    """What `veilcam-decode export` leaves of a veil: readers look at pictures as shown, and in a film of them."""
    try:
        from benchmarks.film import measure, printed
        from train.data.files import DataError
        from train.data.labelled import labelled_pictures
        from train.readers import ReaderError, open_reader
    except ModuleNotFoundError as error:
        _unusable(f"{error.name} is missing: pip install 'veilcam[train]'")

    _check_writable(json_file)
    machine = described()
    try:
        items = [item for folder in pictures for item in labelled_pictures(folder)]
        opened = {name: open_reader(name, readers_folder) for name in readers.split(",")}
    except (DataError, ReaderError) as error:
        _unusable(str(error))
    drawn = Random(0).sample(items, min(count, len(items)))  # noqa: S311 - the same of another run
    with _mistakes_told(), Progress(console=console) as bar:
        catalogue, phi, _ = _loaded(reconstructor, operator, "onnxruntime", _CORES)
        task = bar.add_task("film", total=len(drawn))
        result = measure(drawn, opened, phi, ratio, catalogue, lambda: bar.advance(task))
        result["data"] = [folder.name for folder in pictures]
    _show(result | {"machine": machine}, printed, json_file)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="how long")] = 60.0,
    json_file: Json = None,
) -> None:
    """A service for long, with a sound camera, a slow viewer, a source that hangs and a disk that is full.

    Ends with 1 if memory, threads, open files or latency grew beyond bounds, or something shown was out of order.
    """
    from benchmarks.processes import ProcessError
    from benchmarks.soak import measure, printed

    _check_writable(json_file)
    machine = described()
    with _mistakes_told(ProcessError):
        result = measure(minutes, log.info)
    _show(result | {"machine": machine}, printed, json_file)


@app.command()
def kills(
    times: Annotated[int, typer.Option(min=1, help="camera and server together")] = 200,
    seed: Annotated[int, typer.Option(help="of who is killed, and when")] = 0,
    json_file: Json = None,
) -> None:
    """A camera and a server that records, killed at random; then every frame is recorded, spooled, dropped or lost.

    Ends with 1 if a frame was lost, recorded twice or out of order.
    """
    from benchmarks.kills import measure, printed
    from benchmarks.processes import ProcessError

    _check_writable(json_file)
    machine = described()
    with _mistakes_told(ProcessError):
        result = measure(times, seed, log.info)
    _show(result | {"machine": machine}, printed, json_file)


@app.command()
def network(
    fault: Annotated[list[str] | None, typer.Option(help="its name, or the start of it; may be repeated [all]")] = None,
    json_file: Json = None,
) -> None:
    """Cameras on bad networks, each with another fault: whether frames flow again by themselves, and what is said.

    Ends with 1 if a stream didn't come back as it was, something was shown twice or out of order, or said more than
    once.
    """
    from benchmarks.network import ALL, SHAPED_FAULTS, measure, printed, why_not_shaped
    from benchmarks.processes import ProcessError

    _check_writable(json_file)
    faults = {name: each for name, each in ALL.items() if fault is None or name.startswith(tuple(fault))}
    if not faults:
        _unusable(f"--fault {', '.join(fault or ())}: expected one of {'; '.join(ALL)}")
    left_out = {name: why for name in faults if name in SHAPED_FAULTS and (why := why_not_shaped(name))}
    for name, why in left_out.items():
        log.warning("%s: left out, %s", name, why)
        del faults[name]
    machine = described()
    with _mistakes_told(ProcessError):
        result = measure(faults, log.info)
    _show(result | {"left_out": left_out, "machine": machine}, printed, json_file)


@app.command()
def fuzz(
    inputs: Annotated[int, typer.Option(min=1, help="in all, with those of --json's file")] = 10_000_000,
    work: Annotated[Path, typer.Option(help="folder for the inputs that reach new places")] = Path("fuzz-out"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="keep counts and findings in this file, and go on from it")
    ] = None,
) -> None:
    """Any bytes for every reader of files and messages, guided by coverage; what isn't the reader's own error is found.

    Ends with 1 if something was found that isn't mended.
    """
    from benchmarks.fuzz import FuzzError, measure, open_findings, printed

    _check_writable(json_file)
    state, machine = _begun(json_file), described()

    def keep(news: dict[str, Any]) -> None:
        _write(json_file, news | {"machine": machine})
        log.info("%d inputs, %d findings that aren't mended", news["inputs"], len(open_findings(news)))

    with _mistakes_told(FuzzError):
        measure(inputs, work, state, keep)
    _show(state | {"machine": machine}, printed, json_file)
    _end(open_findings(state))


@app.command()
def demo(
    source: Annotated[str | None, typer.Option(help="source as for veilcam-encode [a clip that is shipped]")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="end after so long [cameras 30, others at their end]")] = 0,
    out: Annotated[Path, typer.Option(help="folder for summary.json and the picture")] = Path("demo-out"),
    ratio: Ratio = 0.1,
) -> None:
    """Stream a clip through camera, service and page, and end with figures and a picture of what was seen."""
    from benchmarks.demo import DemoError, printed
    from benchmarks.demo import demo as run_demo
    from benchmarks.draw_clip import CLIP
    from encoder.sources import scheme_of

    source = source or str(CLIP)
    endless = scheme_of(source) not in ("file", "folder")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with _mistakes_told(DemoError):
        result = run_demo(source, seconds or (30 if endless else 0), out, ratio, stop)
    _show(result, printed, None)


def _begun(path: Path | None) -> dict[str, Any]:
    """What a run before has kept in a file; nothing if there is none."""
    if path is None or not path.exists():
        return {}
    try:
        state = json.loads(path.read_text())
        return {"inputs": int(state["inputs"]), "targets": dict(state["targets"])}
    except (OSError, ValueError, KeyError, TypeError):
        _unusable(f"--json {path}: expected a file that this command has written, or none")


def _size(text: str) -> tuple[int, int]:
    """Height and width."""
    found = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)
    if found is None:
        _unusable(f"--size {text}: expected WIDTHxHEIGHT, as 640x480")
    return int(found[2]), int(found[1])


def _loaded(
    reconstructor: list[Path] | None, operator: Path | None, engine: str, threads: int
) -> tuple[Any, Any, Path]:
    from decoder.catalogue import SHIPPED, load_catalogue
    from encoder.cli import DEFAULT_OPERATOR
    from encoder.sampling import Operator

    path = operator or DEFAULT_OPERATOR
    return load_catalogue(reconstructor or [SHIPPED], engine, threads), Operator.load(path), path


@contextmanager
def _mistakes_told(*others: type[Exception]) -> Iterator[None]:
    """What a user can mend is one line; what broke on the way is one line and another exit code."""
    from benchmarks.quality import QualityError
    from decoder.catalogue import CatalogueError
    from decoder.engines import EngineError
    from encoder.sampling import OperatorError
    from encoder.sinks import SinkError
    from encoder.sources import SourceError

    try:
        yield
    except (QualityError, CatalogueError, EngineError, OperatorError, SourceError) as error:
        _unusable(str(error))
    except SinkError as error:
        _end([str(error)])
    except others as error:
        _end([str(error)])


def _check_writable(path: Path | None) -> None:
    """Before the work, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        _unusable(f"--json {path}: expected a file in a folder that is there")


def _show(
    result: dict[str, Any], printed: Callable[[dict[str, Any]], Iterator[RenderableType]], path: Path | None
) -> None:
    """Print a result and write it; whatever is among its problems ends the command."""
    for part in printed(result):
        console.print(part)
    _write(path, result)
    _end(result.get("problems", []))


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(_folded(result) + "\n")
    except OSError as error:
        _unusable(f"--json {path}: can't be written ({error.strerror})")


def _folded(value: Any, indent: str = "") -> str:
    """JSON, with what is short on one line: a sample, a picture, a run."""
    flat = json.dumps(value)
    if len(flat) <= _LINE or not isinstance(value, dict | list):
        return flat
    inner = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _folded(each, inner) for each in value) + f"\n{indent}]"
    rows = (f"{inner}{json.dumps(name)}: {_folded(each, inner)}" for name, each in value.items())
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


def _end(problems: list[str]) -> None:
    """One line each, if there are any, and no further."""
    for problem in problems:
        log.error("%s", problem)
    if problems:
        sys.exit(BROKE)


def _unusable(problem: str) -> NoReturn:
    log.error("%s", problem)
    sys.exit(UNUSABLE)
