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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

log = logging.getLogger("veilcam.bench")

BROKE = 1
UNUSABLE = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

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


def main() -> None:
    """Entry point of the command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("veilcam.decode", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        import onnxruntime  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        log.error("%s is missing: pip install 'veilcam[decoder]'", error.name)
        sys.exit(UNUSABLE)
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
    from benchmarks.machine import described, headline
    from benchmarks.quality import choose, measure_folder, summary

    _check_writable(json_file)
    with _mistakes_told():
        catalogue, phi, _ = _loaded(reconstructor, operator, engine, threads)
        chosen = choose(catalogue, phi, ratio, rendition)
        rows = list(measure_folder(folder, phi, ratio, chosen))
    machine = described()
    result = summary(rows) | {"folder": folder.name, "ratio": ratio, "rows": phi.rows_for(ratio), "operator": phi.id}
    result |= {
        "rendition": rendition,
        "name": chosen.name,
        "reconstructor": chosen.id,
        "engine": chosen.engine.name,
        "machine": machine,
    }
    table = Table(title=f"{folder.name}, r = {ratio:g}, {chosen.name} ({chosen.id})", caption=headline(machine))
    for column in ("picture", "PSNR, dB", "SSIM", "bits per pixel"):
        table.add_column(column, justify="left" if column == "picture" else "right")
    for row in rows:
        table.add_row(row.picture, f"{row.psnr:.2f}", f"{row.ssim:.4f}", f"{row.bpp:.3f}")
    table.add_section()
    table.add_row(f"mean of {len(rows)}", f"{result['psnr']:.2f}", f"{result['ssim']:.4f}", f"{result['bpp']:.3f}")
    console.print(table)
    if chosen.engine.rows < phi.rows_for(ratio):
        console.print(f"{chosen.name} reads {chosen.engine.rows} of the {phi.rows_for(ratio)} rows sent")
    _write(json_file, result)


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
    from benchmarks.latency import LatencyError, measure, table
    from benchmarks.machine import described, headline
    from encoder.sources import masked

    _check_writable(json_file)
    with _mistakes_told(LatencyError):
        catalogue, _, path = _loaded(reconstructor, operator, engine, threads)
        paced = measure(source, path, ratio, catalogue, lossless=False)
        full = measure(source, path, ratio, catalogue, lossless=True)
    machine, rows = described(), table(paced)
    jpeg = {"median": round(float(np.median(paced.jpeg_ms)), 2), "bytes": round(float(np.mean(paced.jpeg_bytes)))}
    camera = [sum(t) for t in zip(*(paced.stages[s] for s in ("sample", "quantise", "pack")), strict=True)]
    result: dict[str, Any] = {
        "source": masked(source) if "://" in source else Path(source).name,
        "size": list(paced.size),
        "ratio": ratio,
        "engine": {"name": engine, "threads": threads},
        "stages_ms": {row["stage"]: {k: v for k, v in row.items() if k != "stage"} for row in rows},
        "frames": {"captured": paced.captured, "shown": paced.shown},
        "full_speed_frames": {"captured": full.captured, "shown": full.shown},
        "paced_fps": round(paced.shown / paced.seconds, 2),
        "full_speed_fps": round(full.shown / full.seconds, 2),
        "camera_ms": round(float(np.median(camera)), 2),
        "payload_bytes": round(float(np.mean(paced.payload_bytes))),
        "jpeg": jpeg,
        "machine": machine,
    }
    width, height = paced.size
    shown = Table(title=f"{Path(source).name}, {width}×{height}, r = {ratio:g}, ms", caption=headline(machine))
    for column in ("stage", "median", "p95", "p99"):
        shown.add_column(column, justify="left" if column == "stage" else "right")
    for row in rows:
        shown.add_row(row["stage"], *(f"{row[name]:.2f}" for name in ("median", "p95", "p99")))
    console.print(shown)
    console.print(
        f"at its own pace: {paced.shown} of {paced.captured} frames shown, {result['paced_fps']} frames/s; "
        f"at full speed: {full.shown} of {full.captured} frames shown, {result['full_speed_fps']} frames/s"
    )
    console.print(
        f"on the camera: sample + quantise + pack {result['camera_ms']} ms, {result['payload_bytes']} bytes a frame; "
        f"OpenCV JPEG of the same frames {jpeg['median']} ms, {jpeg['bytes']} bytes"
    )
    _write(json_file, result)


@app.command()
def engines(
    reconstructor: Reconstructors = None,
    size: Annotated[list[str], typer.Option(help="WIDTHxHEIGHT; may be repeated")] = ["640x480", "1920x1088"],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="in which each engine takes part once")] = 9,
    threads: Threads = _CORES,
    json_file: Json = None,
) -> None:
    """Milliseconds of every engine that is installed, side by side on the same reconstructors."""
    from benchmarks.engines import measure
    from benchmarks.machine import described, headline
    from decoder.catalogue import SHIPPED, read_forms

    _check_writable(json_file)
    machine = described()
    result: dict[str, Any] = {"threads": threads, "rounds": rounds, "machine": machine, "reconstructors": {}}
    with _mistakes_told():
        sizes = [_size(each) for each in size]
        for forms in read_forms(reconstructor or [SHIPPED]):
            name = forms["float32"].path.stem
            result["reconstructors"][name] = told = measure(forms, sizes, threads, rounds)
            table = Table(title=f"{name}, {threads} threads, median ms (times faster)", caption=headline(machine))
            table.add_column("engine")
            for each in (*size, "dB to onnxruntime"):
                table.add_column(each, justify="right")
            for engine, row in told.items():
                took = [row["sizes"][each] for each in size] if "sizes" in row else []
                cells = [f"{each['median_ms']:.1f} ({each['times_faster']:.2f})" for each in took]
                agrees = "–" if row["agreement_db"] is None else f"{row['agreement_db']:.1f}"
                table.add_row(engine, *(cells or ["–"] * len(size)), row["problem"] or agrees)
            console.print(table)
    _write(json_file, result)


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
    from benchmarks.machine import described, headline
    from benchmarks.processes import ProcessError
    from benchmarks.serve import measure

    _check_writable(json_file)
    machine, rows = described(), []
    table = Table(title=f"{size} at {frame_rate:g} frames/s, {seconds:g} s each", caption=headline(machine))
    counts = ("cameras", "viewers", "received", "made", "dropped", "fps")
    for column in (*counts, "median ms", "p99 ms", "batch", "CPU ms/frame", "MiB"):
        table.add_column(column, justify="right")
    with _mistakes_told(ProcessError):
        _size(size)
        for count, watching in [*((each, 1) for each in cameras), *((1, each) for each in viewers if each != 1)]:
            row = measure(count, size, frame_rate, seconds, watching, engine)
            rows.append(row)
            took = row["latency_ms"]
            cells = (*(row[name] for name in counts), took["median"], took["p99"], row["batch"])
            table.add_row(*map(str, (*cells, row["server_cpu_ms_per_frame"], row["memory_mb"])))
    console.print(table)
    _write(json_file, {"size": size, "frame_rate": frame_rate, "seconds": seconds, "rows": rows, "machine": machine})


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
        from benchmarks.faults import HEIGHT, RATE, WIDTH, measure
    except ModuleNotFoundError as error:
        log.error("%s is missing: pip install 'veilcam[train]'", error.name)
        sys.exit(UNUSABLE)
    from benchmarks.machine import described, headline
    from benchmarks.processes import ProcessError

    _check_writable(json_file)
    machine = described()
    with _mistakes_told(ProcessError):
        result = measure(damaged, connects, seconds, seed, log.info)
    table = Table(title=f"a camera of {WIDTH}×{HEIGHT} at {RATE} frames/s, and the service", caption=headline(machine))
    for column in ("meanwhile", "fps", "gap, ms", "median", "p99", "MiB", "most", "threads", "files"):
        table.add_column(column, justify="left" if column == "meanwhile" else "right")
    for row in result["rows"]:
        took = row["latency_ms"]
        usage = (row.get(name) for name in ("memory_mb", "most_memory_mb", "threads", "open_files"))
        cells = (row["fps"], row["longest_gap_ms"], took["median"], took["p99"], *usage)
        table.add_row(row["phase"], *("–" if each is None else str(each) for each in cells))
    console.print(table)
    for row in result["rows"]:
        answers = "; ".join(f"{number} {answer}" for answer, number in row["answers"].items())
        if answers:
            console.print(f"{row['phase']}: {answers}; {row['endless']} waits without end", highlight=False)
    if "stop" in result:
        stop = result["stop"]
        console.print(f"stopped within {stop['seconds']} s, exit code {stop['code']}", highlight=False)
    given = {"damaged": damaged, "connects": connects, "seconds": seconds, "seed": seed}
    _write(json_file, {"size": [WIDTH, HEIGHT], "frame_rate": RATE} | given | result | {"machine": machine})
    for problem in result["problems"]:
        log.error("%s", problem)
    if result["problems"]:
        sys.exit(BROKE)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="how long")] = 60.0,
    json_file: Json = None,
) -> None:
    """A service for long, with a sound camera, a slow viewer, a source that hangs and a disk that is full.

    Ends with 1 if memory, threads, open files or latency grew beyond bounds, or something shown was out of order.
    """
    from benchmarks.machine import described, headline
    from benchmarks.processes import ProcessError
    from benchmarks.soak import HEIGHT, RATE, WIDTH, measure

    _check_writable(json_file)
    machine = described()
    with _mistakes_told(ProcessError):
        result = measure(minutes, log.info)
    table = Table(title=f"{minutes:g} minutes, {WIDTH}×{HEIGHT} at {RATE} frames/s", caption=headline(machine))
    for column in ("what", "figure", "at the start", "at the end"):
        table.add_column(column, justify="left" if column in ("what", "figure") else "right")
    for name, figures in result["start"].items():
        for figure, before in figures.items():
            after = result["end"].get(name, {}).get(figure)
            table.add_row(name, figure, f"{before:g}", "–" if after is None else f"{after:g}")
    console.print(table)
    _write(json_file, {"size": [WIDTH, HEIGHT], "frame_rate": RATE} | result | {"machine": machine})
    for problem in result["problems"]:
        log.error("%s", problem)
    if result["problems"]:
        sys.exit(BROKE)


@app.command()
def kills(
    times: Annotated[int, typer.Option(min=1, help="camera and server together")] = 200,
    seed: Annotated[int, typer.Option(help="of who is killed, and when")] = 0,
    json_file: Json = None,
) -> None:
    """A camera and a server that records, killed at random; then every frame is recorded, spooled, dropped or lost.

    Ends with 1 if a frame was lost, recorded twice or out of order.
    """
    from benchmarks.kills import SOURCE, measure
    from benchmarks.machine import described, headline
    from benchmarks.processes import ProcessError

    _check_writable(json_file)
    machine = described()
    with _mistakes_told(ProcessError):
        result = measure(times, seed, log.info)
    told = result["first_picture_s"]
    dropped = ", ".join(f"{number} {reason}" for reason, number in result["dropped"].items()) or "none"
    console.print(
        f"{headline(machine)}\n"
        f"killed: the camera {result['kills']['camera']} times, the server {result['kills']['server']} times\n"
        f"recorded {result['recorded']}, still spooled {result['spooled']}, dropped by the camera: {dropped}\n"
        f"lost {result['lost']}, duplicated {result['duplicated']}, out of order {result['out_of_order']}\n"
        + (f"first picture after a server's start: median {told['median']} s, worst {told['worst']} s" if told else ""),
        highlight=False,
    )
    _write(json_file, {"source": SOURCE, "seed": seed} | result | {"machine": machine})
    if result["problems"]:
        sys.exit(BROKE)


@app.command()
def network(
    fault: Annotated[list[str] | None, typer.Option(help="its name, or the start of it; may be repeated [all]")] = None,
    json_file: Json = None,
) -> None:
    """Cameras on bad networks, each with another fault: whether frames flow again by themselves, and what is said.

    Ends with 1 if a stream didn't come back as it was, something was shown twice or out of order, or said more than
    once.
    """
    from benchmarks.machine import described, headline
    from benchmarks.network import FAULTS, LONG_FAULTS, SHAPED_FAULTS, measure, why_not_shaped
    from benchmarks.processes import ProcessError

    _check_writable(json_file)
    known = FAULTS | LONG_FAULTS | SHAPED_FAULTS
    faults = {name: each for name, each in known.items() if fault is None or name.startswith(tuple(fault))}
    if not faults:
        log.error("--fault %s: expected one of %s", ", ".join(fault or ()), "; ".join(known))
        sys.exit(UNUSABLE)
    skipped = {name: why for name in faults if name in SHAPED_FAULTS and (why := why_not_shaped(name))}
    for name, why in skipped.items():
        log.warning("%s: left out, %s", name, why)
        del faults[name]
    machine = described()
    with _mistakes_told(ProcessError):
        result = measure(faults, log.info)
    table = Table(title="cameras on bad networks", caption=headline(machine))
    columns = ("fault", "flows again, s", "as before, s", "ms before", "ms after", "fps before", "fps after", "said")
    for column in columns:
        table.add_column(column, justify="left" if column == "fault" else "right")
    for row in result["rows"]:
        pairs = (row[when][name] for name in ("latency_ms", "fps") for when in ("before", "after"))
        cells = (row["flows_again_s"], row["as_before_s"], *pairs, len(row["said"]))
        table.add_row(row["fault"], *map(str, cells))
    console.print(table)
    _write(json_file, result | {"left_out": skipped, "machine": machine})
    for problem in result["problems"]:
        log.error("%s", problem)
    if result["problems"]:
        sys.exit(BROKE)


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
    from benchmarks.fuzz import FuzzError, measure, open_findings
    from benchmarks.machine import described

    _check_writable(json_file)
    state = _begun(json_file)

    def keep(news: dict[str, Any]) -> None:
        _write(json_file, news | {"machine": described()})
        log.info("%d inputs, %d findings that aren't mended", news["inputs"], len(open_findings(news)))

    with _mistakes_told(FuzzError):
        measure(inputs, work, state, keep)
    keep(state)
    table = Table(title=f"{state['inputs']} inputs")
    for column in ("reader", "inputs", "seconds", "edges", "corpus", "found", "mended"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, told in state["targets"].items():
        mended = sum(finding["mended"] for finding in told["findings"])
        counts = (told[key] for key in ("inputs", "seconds", "edges", "corpus"))
        table.add_row(name, *map(str, (*counts, len(told["findings"]), mended)))
    console.print(table)
    for problem in open_findings(state):
        log.error("%s", problem)
    if open_findings(state):
        sys.exit(BROKE)


def _begun(path: Path | None) -> dict[str, Any]:
    """What a run before has kept in a file; nothing if there is none."""
    if path is None or not path.exists():
        return {}
    try:
        state = json.loads(path.read_text())
        return {"inputs": int(state["inputs"]), "targets": dict(state["targets"])}
    except (OSError, ValueError, KeyError, TypeError):
        log.error("--json %s: expected a file that this command has written, or none", path)
        sys.exit(UNUSABLE)


def _size(text: str) -> tuple[int, int]:
    from benchmarks.quality import QualityError

    found = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)
    if found is None:
        raise QualityError(f"--size {text}: expected WIDTHxHEIGHT, as 640x480")
    return int(found[2]), int(found[1])


@app.command()
def demo(
    source: Annotated[str | None, typer.Option(help="source as for veilcam-encode [a clip that is shipped]")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="end after so long [cameras 30, others at their end]")] = 0,
    out: Annotated[Path, typer.Option(help="folder for summary.json and the picture")] = Path("demo-out"),
    ratio: Ratio = 0.1,
) -> None:
    """Stream a clip through camera, service and page, and end with figures and a picture of what was seen."""
    from benchmarks.demo import DemoError
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
    ms = result["latency_ms"]
    unsent = ", ".join(f"{count} {reason}" for reason, count in result["frames_not_sent"].items())
    told = f"{result['frames_captured']} captured{f' (not sent: {unsent})' if unsent else ''}"
    console.print(
        f"\nframes: {told}, {result['frames_sent']} sent, {result['frames_shown']} shown, "
        f"{result['frames_dropped']} dropped\n"
        f"latency from capture to shown: median {ms['median']} ms, 99th percentile {ms['p99']} ms\n"
        f"measurements: {result['kbit_s']} kbit/s\n"
        f"PSNR against the frames: plain {result['psnr_plain']} dB, veiled {result['psnr_veiled']} dB\n"
        f"original | plain | veiled: {result['picture']}",
        highlight=False,
    )


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
        log.error("%s", error)
        sys.exit(UNUSABLE)
    except SinkError as error:
        log.error("%s", error)
        sys.exit(BROKE)
    except others as error:
        log.error("%s", error)
        sys.exit(BROKE)


def _check_writable(path: Path | None) -> None:
    """Before the work, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        log.error("--json %s: expected a file in a folder that is there", path)
        sys.exit(UNUSABLE)


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        log.error("--json %s: can't be written (%s)", path, error.strerror)
        sys.exit(UNUSABLE)
