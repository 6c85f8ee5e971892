"""veilcam-train: train Φ and G, veil G, measure what a veil leaves readers, export for cameras and servers."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from train.data.small import SmallSet
    from train.readers import Reader
    from train.reproduce import Runner, Step

log = logging.getLogger("veilcam.train")

BROKE = 1
UNUSABLE = 2
_TOLD_EVERY_S = 60.0
"""Seconds between lines of progress where no terminal shows a bar."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Runs = Annotated[Path, typer.Option(help="folder with one folder per run")]
Data = Annotated[
    list[Path] | None,
    typer.Option(help="folder with the data: photographs, or CIFAR-10's or MNIST's files; may be repeated"),
]
CACHE = Path.home() / ".cache" / "veilcam"
Cache = Annotated[Path, typer.Option(help="where public data sets are kept once they are fetched")]
ReadersFolder = Annotated[Path | None, typer.Option(help="folder with readers' weights that no package has")]


def main() -> None:
    """Entry point of the command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        import matplotlib as mpl  # noqa: F401
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import PIL  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        log.error("%s is missing: pip install 'veilcam[train]'", error.name)
        sys.exit(UNUSABLE)
    app()


@app.command()
def run(
    run_file: Annotated[Path, typer.Argument(help="run file, as in train/runs/")],
    data: Data = None,
    runs: Runs = Path("runs"),
    cache: Cache = CACHE,
    readers_folder: ReadersFolder = None,
) -> None:
    """Train by a run file, into RUNS/NAME. A run that was interrupted goes on from its last checkpoint."""
    from train.loops import plain, veil
    from train.loops.small import start
    from train.reproduce import finished
    from train.settings import PlainRun, SettingsError, SmallRun, VeilRun, read_run

    with _mistakes_told("the same command goes on from the last checkpoint"):
        settings = read_run(run_file)
        out = runs / run_file.stem
        if finished(runs, run_file.stem, settings):
            log.info("%s: has finished already; move %s away to start anew", out / "final.pt", out)
            return
        if isinstance(settings, PlainRun | VeilRun) and not data:
            raise SettingsError(f"--data: a {settings.kind} run learns from a folder of photographs, name one")
        with _bar(run_file.stem, settings.iterations) as advance:
            if isinstance(settings, PlainRun):
                final = plain.train(settings, data or [], out, runs, advance)
            elif isinstance(settings, VeilRun):
                final = veil.train(settings, data or [], out, runs, advance, readers_folder)
            else:
                assert isinstance(settings, SmallRun)
                final = start(settings, data or [], cache, out, advance)
        log.info("%s", final)


@app.command()
def strengthen(
    name: Annotated[str, typer.Argument(help="a finished veil run in RUNS")],
    by: Annotated[float, typer.Option(help="0.5 to 1.5; 1 is as it was trained, below it is weaker")],
    runs: Runs = Path("runs"),
) -> None:
    """Make a veil stronger, or weaker, without training: a run RUNS/NAME-xBY, to evaluate and export as any other."""
    from train.loops.veil import strengthened

    with _mistakes_told():
        made = strengthened(name, by, runs)
        log.info("%s: to be measured (veilcam-train evaluate %s) and then exported", made, made.parent.name)


@app.command()
def evaluate(
    name: Annotated[str, typer.Argument(help="a finished veil run in RUNS")],
    pictures: Annotated[list[Path], typer.Option(help="folder of labelled photographs; may be repeated")],
    runs: Runs = Path("runs"),
    readers_folder: ReadersFolder = None,
    readers: Annotated[str, typer.Option(help="readers, comma-separated")] = "",
) -> None:
    """Measure what readers read of originals, plain, veiled and control pictures; writes RUNS/NAME/evaluation.json.

    Models of CIFAR-10 and MNIST are measured by `reproduce --only NAME`.
    """
    from train import checkpoint
    from train.data.labelled import labelled_pictures
    from train.evaluation.photographs import measure_veil
    from train.evaluation.small import EVALUATION
    from train.loops.plain import network_of
    from train.loops.schedule import fingerprints
    from train.loops.veil import reconstructor_of

    with _mistakes_told():
        by = checkpoint.provenance()
        veiled, state = reconstructor_of(runs / name / "final.pt", runs)
        needs = fingerprints(runs, [name, state["run"]["extends"]])
        base, _ = network_of(runs / state["run"]["extends"] / "final.pt")
        items = [item for folder in pictures for item in labelled_pictures(folder)]
        evaluation = runs / name / EVALUATION
        partial = evaluation.with_suffix(".partial")
        partial.touch()  # what can't be written is told before it is measured
        partial.unlink()
        opened = _opened(readers, readers_folder)
        with _bar(name, len(items)) as advance:
            seen = iter(range(1, len(items) + 1))
            table = measure_veil(base, veiled, items, opened, lambda: advance({"iteration": next(seen)}))
        result = table.as_json() | {
            "data": [folder.name for folder in pictures],
            "trained_against": state["run"]["readers"],
            "trained": state["provenance"],
            "strength": state.get("strength", 1.0),
            "measured": by,
            "needs": needs,
        }
        checkpoint.save_text(evaluation, json.dumps(result, indent=1) + "\n")
        _print_table(result)


@app.command()
def reproduce(
    schedule: Annotated[
        str,
        typer.Option(
            help="the paper's, full; reduced, for a CPU; short, for a GPU in minutes; or a folder of run files"
        ),
    ],
    data: Data = None,
    runs: Runs = Path("runs"),
    cache: Cache = CACHE,
    only: Annotated[list[str] | None, typer.Option(help="runs to do, with wildcards, and what they need")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with runs that were interrupted")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="steps to do at once; a GPU is full with about 8")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan, with times measured here")] = False,
) -> None:
    """Do all runs and measurements behind the paper's tables into RUNS/SCHEDULE, skipping what is done."""
    from functools import partial

    from train.devices import find_device
    from train.jobs import do_at_once
    from train.reproduce import RUN_FILES, SCHEDULES, Runner, Schedule, estimates
    from train.settings import SettingsError

    with _mistakes_told("nothing was trained" if dry_run else "reproduce --resume goes on from the last checkpoint"):
        folder = RUN_FILES / schedule if schedule in SCHEDULES else Path(schedule).resolve()
        plan = Schedule(folder)
        steps = plan.steps(only or [])
        device = find_device()
        log.info("on %s", device.told)

        sets = _sets(data or [], cache)
        runner = Runner(plan, runs / folder.name, device, sets, _bar)
        todo = [step for step in steps if not runner.done(step)]
        log.info("%d steps, with what they need, %d of them done", len(steps), len(steps) - len(todo))
        for step in todo:
            if runner.begun(step) and not (resume or dry_run):
                raise SettingsError(f"{runs / folder.name / step.name}: was interrupted; --resume goes on with it")
        for name in sorted({(step.run or plan.runs[step.name]).data for step in todo}):
            sets(name)  # fetched once, and what is wrong with it told once, before any step or process begins
        if dry_run:
            log.info("measuring how long each takes: minutes, and other load spoils it")
            _print_plan(estimates(plan, steps, todo, device, sets, _no_bar), todo, len(steps))
            return
        if jobs > 1:
            do_at_once(todo, jobs, partial(_quiet_runner, folder, runs / folder.name, data or [], cache))
            return
        for number, step in enumerate(todo, 1):
            log.info("%d of %d: %s", number, len(todo), step.told)
            runner.do(step)


@app.command()
def report(
    data: Data = None,
    runs: Runs = Path("runs"),
    cache: Cache = CACHE,
    docs: Annotated[Path, typer.Option(help="folder to write paper.md, paper.json and paper/ into")] = Path("docs"),
) -> None:
    """Write the paper's tables and figures beside ours from what `reproduce` left in RUNS."""
    from train.data.small import open_set
    from train.devices import find_device
    from train.report.write import write
    from train.reproduce import RUN_FILES

    with _mistakes_told():
        log.info("%s", write(RUN_FILES, runs, docs, lambda name: open_set(name, data or [], cache), find_device()))


@app.command()
def export(
    names: Annotated[list[str], typer.Argument(help="finished runs in RUNS")],
    operator_run: Annotated[
        str, typer.Option(help="the plain run with the most rows, or the CSNet: its Φ is the operator")
    ],
    runs: Runs = Path("runs"),
    operator: Annotated[Path, typer.Option(help="operator file to write")] = Path("operator.npz"),
    reconstructors: Annotated[Path, typer.Option(help="folder to write NAME.onnx into")] = Path("reconstructors"),
    data: Data = None,
    cache: Cache = CACHE,
) -> None:
    """Write one operator file, and a reconstructor (ONNX, checked against torch) for each run."""
    from train import checkpoint
    from train.data.small import open_set
    from train.export import export_runs
    from train.settings import MODEL_KINDS

    with _mistakes_told():
        settings = checkpoint.load(runs / operator_run / "final.pt")["run"]
        learned_from = None
        if settings["kind"] in MODEL_KINDS:
            learned_from = open_set(settings["data"], data or [], cache).train.x
        for path in export_runs(names, operator_run, runs, operator, reconstructors, learned_from):
            log.info("%s", path)


@app.command()
def quantise(
    reconstructor: Annotated[Path, typer.Argument(help="reconstructor in float32, .onnx")],
    operator: Annotated[Path, typer.Option(help="operator file that it was trained for")],
    pictures: Annotated[
        list[Path], typer.Option(help="folder of photographs to calibrate on and check with; may be repeated")
    ],
    precision: Annotated[str, typer.Option(help="int8 for CPUs, int8-symmetric for TensorRT")] = "int8",
    labelled: Annotated[
        list[Path] | None, typer.Option(help="folder of labelled photographs to look at a veil; may be repeated")
    ] = None,
    readers_folder: ReadersFolder = None,
    readers: Annotated[str, typer.Option(help="readers that look at a veil, comma-separated [all]")] = "",
) -> None:
    """Write RECONSTRUCTOR.PRECISION.onnx: the same reconstructor with its trunk in integers, if it is as good."""
    from encoder.sampling import Operator
    from train.data.labelled import labelled_pictures
    from train.data.photographs import picture_files
    from train.quantise import CALIBRATED_ON, PRECISIONS
    from train.quantise import quantise as write
    from train.settings import SettingsError

    with _mistakes_told():
        if precision not in PRECISIONS:
            raise SettingsError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
        if not reconstructor.is_file():
            raise SettingsError(f"{reconstructor}: no such file")
        out = reconstructor.with_suffix(f".{precision}.onnx")
        phi = Operator.load(operator)
        items = [item for folder in labelled or [] for item in labelled_pictures(folder)]
        opened = _opened(readers, readers_folder) if items else {}
        total = max(0, sum(len(picture_files(folder)) for folder in pictures) - CALIBRATED_ON) + len(items)
        with _bar(out.name, max(1, total)) as advance:
            seen = iter(range(1, total + 1))
            measured = write(
                reconstructor, phi, pictures, out, precision, items, opened, lambda: advance({"iteration": next(seen)})
            )
        log.info("%s: %s", out, measured)


@contextmanager
def _mistakes_told(goes_on: str = "nothing was written") -> Iterator[None]:
    """A user's mistake is one line and exit code 2, what broke on the way one line and 1; a bug keeps its traceback.

    Args:
        goes_on: what to say to who interrupts.
    """
    from encoder.sampling import OperatorError
    from train.checkpoint import CheckpointError
    from train.data.files import DataError
    from train.export import ExportError
    from train.jobs import JobError
    from train.readers import ReaderError
    from train.settings import SettingsError

    try:
        yield
    except (OperatorError, CheckpointError, DataError, ExportError, ReaderError, SettingsError) as error:
        log.error("%s", error)
        sys.exit(UNUSABLE)
    except OSError as error:
        log.error("%s: %s", error.filename or "the disk", error.strerror or error)
        sys.exit(BROKE)
    except JobError as error:
        log.error("%s", error)
        sys.exit(BROKE)
    except KeyboardInterrupt:
        log.error("interrupted; %s", goes_on)
        sys.exit(BROKE)


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar that shows the newest row of the log; where there is no terminal, a line of it now and then."""
    console = Console(stderr=True)
    if not (console.is_interactive and sys.stderr.isatty()):
        with _lines(name, total) as advance:
            yield advance
        return
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, terms="")
        yield lambda row: progress.update(task, completed=row["iteration"], terms=_terms(row))


@contextmanager
def _lines(name: str, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Tells a row of the log at most once a minute, with the time left by the rows so far; at the end the last."""
    rows: list[tuple[float, dict[str, Any]]] = []
    """The first, the newest, and when they came."""
    told = -math.inf

    def tell(*left: str) -> None:
        nonlocal told
        told, row = rows[-1]
        log.info("%s: %s", name, ", ".join(filter(None, (f"{row['iteration']} of {total}", *left, _terms(row)))))

    def advance(row: dict[str, Any]) -> None:
        rows[1:] = [(time.monotonic(), row)]
        (began, first), (now, _) = rows[0], rows[-1]
        done = row["iteration"] - first["iteration"]
        if now - told >= _TOLD_EVERY_S and row["iteration"] < total:
            tell(f"{(now - began) / done * (total - row['iteration']) / 60:.0f} min left" if done else "")

    yield advance
    if rows and rows[-1][0] > told:
        tell()


def _terms(row: dict[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in row.items() if key not in ("iteration", "seconds"))


def _print_table(result: dict[str, Any]) -> None:
    ways = next(iter(next(iter(result["recognition"].values())).values()))
    for way in ways:
        table = Table(title=f"recognition, %, {way} ({result['pictures']} pictures)")
        for column in ("pictures", "PSNR, dB", *result["recognition"]):
            table.add_column(column, justify="left" if column == "pictures" else "right")
        for rendition, fidelity in result["psnr"].items():
            read = [f"{readings[rendition][way]:.1f}" for readings in result["recognition"].values()]
            table.add_row(rendition, "" if rendition == "original" else f"{fidelity:.2f}", *read)
        Console().print(table)


def _opened(readers: str, folder: Path | None) -> "dict[str, Reader]":
    """The readers that ``--readers`` names, or all."""
    from train.readers import JUDGES, SURROGATES, open_reader

    names = [name for name in readers.split(",") if name] or [*SURROGATES, *JUDGES]
    return {name: open_reader(name, folder) for name in names}


def _sets(data: list[Path], cache: Path) -> "Callable[[str], SmallSet]":
    """Opens data sets by name, each once."""
    from functools import cache as remembered

    from train.data.small import open_set

    return remembered(lambda name: open_set(name, data, cache))


def _quiet_runner(schedule: Path, runs: Path, data: list[Path], cache: Path) -> "Runner":
    """For a process beside others: progress stands in the runs' logs."""
    from train.devices import find_device
    from train.reproduce import Runner, Schedule

    return Runner(Schedule(schedule), runs, find_device(), _sets(data, cache), _no_bar)


@contextmanager
def _no_bar(name: str, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    yield lambda row: None


def _print_plan(estimated: "Iterator[tuple[Step, float]]", todo: "list[Step]", count: int) -> None:
    """Line by line as each is measured, which takes a while; not what networks that learned nothing log by the way."""
    total, level = 0.0, log.level
    log.setLevel(logging.ERROR)
    try:
        for number, (step, seconds) in enumerate(estimated, 1):
            total += seconds
            takes = f"{seconds / 60:.1f} min" if step in todo else "done"
            typer.echo(f"{takes:>10}  {step.told} ({step.file.name}), {number} of {count}")
    finally:
        log.setLevel(level)
    typer.echo(f"{total / 60:>6.0f} min  in all")
