"""``veilcam-encode``: film, sample, and stream measurements to a decoder service."""

import contextlib
import itertools
import logging
import os
import re
import signal
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pythonjsonlogger.json import JsonFormatter
from rich.console import Console
from rich.live import Live
from rich.text import Text

from encoder.link import ServerLink
from encoder.packing import Packer
from encoder.pipeline import Account, capturing, run
from encoder.sampling import Operator, OperatorError
from encoder.sinks import FileSink, Sink, SinkError
from encoder.sources import Frame, Source, SourceError, open_source, scheme_of, source_class
from encoder.sources.watched import SILENCE_S, WatchedSource
from encoder.spool.spool import LEAST_BYTES, Spool, SpoolError
from encoder.spooled import SpooledLink
from encoder.tls import Tls, TlsError
from protos.rules import CAMERA_NAME, CAMERA_NAME_TOLD
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.encode")

OPERATORS = Path(__file__).parent / "operators"
DEFAULT_OPERATOR = OPERATORS / "b16.npz"
BROKE = 1
"""Exit code: the source, the server or the file broke on the way."""
UNUSABLE = 2
"""Exit code: what was asked for can't be done (a missing file, a busy camera, a bad option)."""

_SPOOL_BYTES, _SPOOL_HOURS, _SPOOL_RATE = 1 << 30, 168.0, 30.0
"""What a spool has unless it is said."""
_LOG_EVERY_S = 10.0
_POLL_S = 0.25

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the command."""
    app()


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"veilcam {version('veilcam')}")
        raise typer.Exit


@app.command()
def encode(
    source: Annotated[
        str,
        typer.Argument(
            help="0, /dev/video0, rtsp://…, http://…, a video file, a folder of pictures, or pattern[:640x480[@25]]"
        ),
    ],
    server: Annotated[str, typer.Option(help="HOST:PORT of the decoder service")] = "127.0.0.1:50051",
    name: Annotated[str | None, typer.Option(help="name of this camera [the one in --certificate, or camera]")] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="authority of the server's certificate: speak TLS [none]")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="certificate of this camera, whose name is the camera's")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="its key")] = None,
    operator: Annotated[Path, typer.Option(help="sampling operator file (Φ)")] = DEFAULT_OPERATOR,
    ratio: Annotated[float, typer.Option(help="sampling ratio r: measurements per pixel")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="write the messages to this file instead of to a server")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="what --out has already is replaced")] = False,
    as_fast_as_possible: Annotated[
        bool, typer.Option("--as-fast-as-possible", help="every frame of a file, folder or pattern, without waiting")
    ] = False,
    give_up_seconds: Annotated[
        float, typer.Option(min=0, help="end when the server has been away for so long; 0: try for ever")
    ] = 0.0,
    silence_seconds: Annotated[
        float, typer.Option(min=0.5, max=60, help="open a camera again that has given no frame for so long")
    ] = SILENCE_S,
    spool: Annotated[
        str | None, typer.Option(metavar="DIR", help="keep frames here until the server has them [none: newest wins]")
    ] = None,
    spool_size: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES", min=LEAST_BYTES, help=f"of the spool at most; the oldest frames go first [{_SPOOL_BYTES}]"
        ),
    ] = None,
    spool_hours: Annotated[
        float | None, typer.Option(min=0.001, help=f"drop frames of the spool that are older [{_SPOOL_HOURS:g}]")
    ] = None,
    spool_rate: Annotated[
        float | None,
        typer.Option(min=0.1, help=f"frames of the spool a second at most, beside live ones [{_SPOOL_RATE:g}]"),
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="log lines as JSON, no live line")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="tell the version and end")
    ] = False,
) -> None:
    """Sample a camera's pictures with Φ and stream the measurements to a decoder service.

    A server that is away, at the start or later, is tried again for ever; what a camera sees meanwhile is dropped and
    counted, or with --spool kept and sent later. A camera that gives nothing any more is opened again for ever.

    Exit codes: 0 ended, or stopped with Ctrl-C once the source gave frames; 1 the source or the file broke on the way,
    the server refused this camera from the start, was away when the source ended (with --spool its frames wait
    there: 0), or for longer than --give-up-seconds; 2 what was asked for can't be done.
    """
    _start_logging(log_json)
    # Until there are frames there is nothing to end cleanly, and what opens a source can't be interrupted.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    tls = Tls(ca, certificate, key) if ca or certificate or key else None
    try:
        named = tls.check() if tls else None
    except TlsError as error:
        _fail(UNUSABLE, str(error))
    if name is None:
        name = named or "camera"
    if not CAMERA_NAME.fullmatch(name):
        _fail(UNUSABLE, f"--name {name!r}: expected {CAMERA_NAME_TOLD}")
    if out is None:
        _check_address(server)
    _check_spool(spool, {"--spool-size": spool_size, "--spool-hours": spool_hours, "--spool-rate": spool_rate})
    stop = threading.Event()
    try:
        _check_out(out, source, overwrite)
        packer = Packer(Operator.load(operator), ratio)
        opened = _open(source, not as_fast_as_possible, silence_seconds, stop)
        frames = opened.frames()
        first = next(frames, None)
    except (OperatorError, SourceError) as error:
        _fail(UNUSABLE, str(error))
    if first is None:
        _fail(UNUSABLE, f"{opened.name}: gives no frames")
    lossless = as_fast_as_possible and not opened.live
    if spool and (out or lossless):
        why = "a file that is written needs none" if out else "--as-fast-as-possible waits for the server anyway"
        _fail(UNUSABLE, f"--spool: {why}")
    if as_fast_as_possible and opened.live:
        log.warning("--as-fast-as-possible is for files, folders and the pattern; a camera keeps its own pace")
    account = Account(colour=first.colour)
    _stop_on_signals(stop)
    hello = _hello(name, packer.operator, first, opened.frame_rate)
    sink: Sink
    try:
        if spool:
            size, hours = spool_size or _SPOOL_BYTES, spool_hours or _SPOOL_HOURS
            late = Spool(Path(spool), name, size, hours, account.dropped)
            hello.epoch = late.epoch
            if late.waiting:
                log.info("spool %s: %d frames of runs before are to be sent", late.path, late.waiting)
            sink = SpooledLink(
                *(server, hello, account.dropped, late, spool_rate or _SPOOL_RATE),
                resizable=opened.live, give_up_s=give_up_seconds, tls=tls,
            )  # fmt: skip
        else:
            sink = _open_sink(server, out, hello, account, lossless, opened.live, give_up_seconds, tls)
    except SpoolError as error:
        _fail(UNUSABLE, str(error))
    except SinkError as error:
        _fail(BROKE, str(error))
    log.info(
        "%s → %s as %s: %d×%d, operator %s, %d of %d rows (ratio %.3f)",
        *(opened.name, sink.name, name, first.luma.shape[1], first.luma.shape[0]),
        *(packer.operator.id, packer.rows, packer.operator.rows, packer.rows / packer.operator.block**2),
    )
    began = time.monotonic()
    _tell_colour(account)
    over = threading.Event()
    reporter = threading.Thread(target=_report, args=(account, opened, sink, over, log_json), daemon=True)
    reporter.start()
    problem: Exception | None = None
    try:
        if not opened.live and _waited(sink, stop):
            opened.close()
            opened = open_source(source, paced=not as_fast_as_possible)
            first, frames = None, opened.frames()
        run(itertools.chain([first] if first else [], frames), packer, sink, account, stop, lossless)
    except (SourceError, SinkError) as error:
        problem = error
    over.set()
    reporter.join()
    if not capturing():
        opened.close()
    try:
        sink.close()
    except SinkError as error:
        problem = problem or (None if stop.is_set() else error)
    _tell_colour(account)
    if account.captured or not problem:  # else it ended at once, and figures would only hide why
        log.info("%s", _summary(account, opened, sink, time.monotonic() - began))
    if problem:
        log.error("%s", problem)
    _leave(BROKE if problem else 0)


def _check_address(server: str) -> None:
    found = re.fullmatch(r"(.+):(\d{1,5})", server)
    if not found:
        _fail(UNUSABLE, f"--server {server!r}: expected HOST:PORT")
    if ":" in found[1] and not re.fullmatch(r"\[.*\]", found[1]):
        _fail(UNUSABLE, f"--server {server!r}: an IPv6 address stands in brackets, as in [::1]:50051")
    if not 0 < int(found[2]) < 1 << 16:
        _fail(UNUSABLE, f"--server {server!r}: port {found[2]}, expected 1 to 65535")


def _check_out(out: Path | None, source: str, overwrite: bool) -> None:
    """What is there already is replaced only if that is asked for, and what is filmed never."""
    if out is None:
        if overwrite:
            _fail(UNUSABLE, "--overwrite: no file is written; give --out FILE")
        return
    filmed = Path(source) if scheme_of(source) in ("file", "folder", "pipe", "device") else None
    with contextlib.suppress(OSError):  # what can't be looked at can't be opened either, and that is told then
        if filmed and filmed.is_dir():
            links = out.exists() and any(out.samefile(each) for each in filmed.iterdir() if each.exists())
            if links or out.resolve().parent == filmed.resolve():
                _fail(UNUSABLE, f"--out {out}: lies in the source, {source}; another folder")
        if filmed and filmed.exists() and out.exists() and out.samefile(filmed):
            _fail(UNUSABLE, f"--out {out}: is the source itself; another name")
        if not overwrite and out.is_file() and out.stat().st_size:
            _fail(UNUSABLE, f"--out {out}: is there already: another name, or --overwrite")


def _check_spool(spool: str | None, more: dict[str, float | None]) -> None:
    if spool == "":
        _fail(UNUSABLE, "--spool '': expected a folder")
    for option, given in more.items():
        if spool is None and given is not None:
            _fail(UNUSABLE, f"{option}: there is no spool; give --spool DIR")


def _hello(name: str, operator: Operator, first: Frame, frame_rate: float) -> pb.Hello:
    height, width = first.luma.shape
    epoch = time.time_ns() // 1_000_000
    return pb.Hello(
        camera=name, operator_id=operator.id, width=width, height=height, frame_rate=frame_rate, epoch=epoch
    )


def _open(source: str, paced: bool, silence_s: float, stop: threading.Event) -> Source:
    kind = source_class(source)
    return WatchedSource(source, silence_s, stop) if kind.live else kind(source, paced)


def _open_sink(
    server: str, out: Path | None, hello: pb.Hello, account: Account, lossless: bool, live: bool, give_up_s: float,
    tls: Tls | None,
) -> Sink:  # fmt: skip
    if out:
        return FileSink(out, hello)
    return ServerLink(server, hello, account.dropped, lossless, resizable=live, give_up_s=give_up_s, tls=tls)


def _waited(sink: Sink, stop: threading.Event) -> bool:
    """Wait until there is somewhere to send to; whether that took so long that a paced source is to begin anew."""
    began = time.monotonic()
    while not (stop.is_set() or sink.wait_until_ready(_POLL_S)):
        pass
    return time.monotonic() - began > _POLL_S


def _stop_on_signals(stop: threading.Event) -> None:
    """Ctrl-C and SIGTERM end the stream cleanly; a second one ends the process at once."""

    def ask(*_: object) -> None:
        if stop.is_set():
            os._exit(BROKE)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)


def _report(account: Account, source: Source, sink: Sink, stop: threading.Event, quiet: bool) -> None:
    console = Console(stderr=True)
    if console.is_terminal and not quiet:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while not stop.wait(0.25):
                _tell_colour(account)
                live.update(Text(_line(account, source, sink), no_wrap=True, overflow="ellipsis"))
    else:
        while not stop.wait(_LOG_EVERY_S):
            _tell_colour(account)
            log.info("%s", _line(account, source, sink))


def _tell_colour(account: Account) -> None:
    if account.colour and not account.colour_told:
        account.colour_told = True
        log.warning("the source is in colour; only luma is sent, colour is not sent yet")


def _line(account: Account, source: Source, sink: Sink) -> str:
    if isinstance(source, WatchedSource) and source.away_since:
        return f"no frames since {source.away_since}"
    if isinstance(sink, ServerLink) and sink.away_since:
        spooled = f", {sink.spool.told()}" if isinstance(sink, SpooledLink) else ""
        return f"server away since {sink.away_since}, dropped here {_dropped(account)}{spooled}"
    rate, kbit_s = account.recent()
    mean, told = account.stage_means(), sink.progress
    return (
        f"{rate:.1f} fps · {kbit_s:.0f} kbit/s · ms: capture {mean.capture:.1f}, sample {mean.sample:.1f}, "
        f"quantise {mean.quantise:.1f}, pack {mean.pack:.1f} · sent {account.sent}, "
        f"acknowledged up to {told.received}, shown up to {told.shown}, unwatched {told.unwatched}, "
        f"dropped here {_dropped(account)}, at the server {told.dropped}"
        + (f" · {sink.spool.told()}" if isinstance(sink, SpooledLink) else "")
    )


def _summary(account: Account, source: Source, sink: Sink, seconds: float) -> str:
    told = sink.progress
    answered = f"shown up to {told.shown}, unwatched {told.unwatched}, dropped at the server {told.dropped}"
    return (
        f"{seconds:.1f} s: captured {account.captured}, sent {account.sent} ({account.keys} key), "
        f"{account.bytes_sent * 8 / 1000 / max(seconds, 1e-3):.0f} kbit/s; "
        f"dropped here: {_reasons(account) or 'none'}; "
        + (f"acknowledged up to {told.received}, {answered}" if isinstance(sink, ServerLink) else f"in {sink.name}")
        + (f"; {sink.spool.told()}" if isinstance(sink, SpooledLink) else "")
        + (_absences("server away", sink.outages, sink.seconds_away) if isinstance(sink, ServerLink) else "")
        + (_absences("no frames", source.outages, source.seconds_away) if isinstance(source, WatchedSource) else "")
    )


def _dropped(account: Account) -> str:
    reasons = _reasons(account)
    return f"{account.dropped.total()} ({reasons})" if reasons else "0"


def _reasons(account: Account) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in account.dropped.items() if count)


def _absences(what: str, count: int, seconds: float) -> str:
    return f"; {what} {'once' if count == 1 else f'{count} times'}, {seconds:.1f} s in all" if count else ""


def _start_logging(as_json: bool) -> None:
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter("{asctime}{levelname}{name}{message}", style="{") if as_json else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _leave(code: int) -> NoReturn:
    """End the program; at once if a source still hangs in OpenCV, which aborts what ends in the orderly way."""
    if capturing():
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


def _fail(code: int, problem: str) -> NoReturn:
    log.error("%s", problem)
    sys.exit(code)
