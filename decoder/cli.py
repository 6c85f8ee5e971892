"""``veilcam-decode``: take cameras' measurements, rebuild pictures, show them."""

import asyncio
import logging
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pythonjsonlogger.json import JsonFormatter

if TYPE_CHECKING:
    from decoder.server import Server

log = logging.getLogger("veilcam.decode")

BROKE = 1
"""Exit code: the service broke while it ran."""
UNUSABLE = 2
"""Exit code: what was asked for can't be done (a missing file, a taken port, a bad option)."""

_CORES = os.cpu_count() or 1
_TIMES = ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d"]
_RENDITION = {False: "veiled", True: "plain"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the command."""
    app()


Reconstructors = Annotated[
    list[Path] | None,
    typer.Option(help="reconstructor file, or a folder of them; may be repeated [the shipped ones]"),
]
EngineName = Annotated[str, typer.Option(help="runtime: onnxruntime")]
Threads = Annotated[int, typer.Option(min=1, help="threads of the engine [all cores]")]


@app.callback(invoke_without_command=True)
def decode(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 takes a free one")] = 50051,
    http: Annotated[int, typer.Option(min=0, max=65535, help="port of the web page; 0 takes a free one")] = 8080,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    reconstructor: Reconstructors = None,
    engine: EngineName = "onnxruntime",
    threads: Threads = _CORES,
    save: Annotated[
        Path | None, typer.Option(help="save pictures as they are shown: DIR/CAMERA/CAPTURETIME-SEQUENCE.png")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="record measurements as they come: DIR/CAMERA/CAPTURETIME.vcseg")
    ] = None,
    record_hours: Annotated[float, typer.Option(min=0, help="delete recordings that are older; 0 keeps them")] = 0,
    record_megabytes: Annotated[int, typer.Option(min=0, help="keep so much of them at most; 0: no limit")] = 0,
    record_free: Annotated[int, typer.Option(min=0, help="megabytes of the disk that recordings leave free")] = 1024,
    allow_plain: Annotated[
        bool, typer.Option("--allow-plain", help="let any viewer ask for plain pictures, which classifiers can read")
    ] = False,
    max_cameras: Annotated[int, typer.Option(min=1, help="cameras at most")] = 64,
    max_pixels: Annotated[int, typer.Option(min=256, help="pixels of a picture at most")] = 4096 * 2304,
    log_json: Annotated[bool, typer.Option("--log-json", help="log lines as JSON")] = False,
) -> None:
    """Serve cameras and viewers until Ctrl-C; a second Ctrl-C ends at once.

    Exit codes: 0 stopped; 1 the service broke while it ran; 2 what was asked for can't be done.
    """
    _start_logging(log_json)
    if context.invoked_subcommand is not None:
        return
    # gRPC's core writes lines of its own beside ours; it reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from decoder.admission import Limits
        from decoder.catalogue import SHIPPED, CatalogueError, load_catalogue
        from decoder.engines import EngineError
        from decoder.recordings.store import Retention
        from decoder.server import Server, ServerError, Settings
    except ModuleNotFoundError as error:
        log.error("%s is missing: pip install 'veilcam[decoder]'", error.name)
        sys.exit(UNUSABLE)
    retention = Retention(record_hours, record_megabytes, record_free)
    limits = Limits(cameras=max_cameras, pixels=max_pixels)
    settings = Settings(host, port, http, allow_plain, save, record, retention, limits)

    async def serve() -> int:
        catalogue = load_catalogue(reconstructor or [SHIPPED], engine, threads)
        server = Server(catalogue, settings)
        await server.start()
        if record:
            log.info("recording measurements into %s", record)
        for each in catalogue.reconstructors:
            log.info(
                "reconstructor %s (%s): id %s, operator %s, %d rows; engine %s on %s, %d threads",
                *(each.name, each.rendition, each.id, each.operator_id, each.engine.rows),
                *(each.engine.name, each.engine.device, each.engine.threads),
            )
        if allow_plain:
            log.warning("--allow-plain: every viewer may ask for plain pictures, which classifiers can read")
        if host not in ("127.0.0.1", "::1", "localhost"):
            log.warning("listening on %s without TLS and authentication: everyone who reaches it can watch", host)
        ports = {"grpc_port": server.port, "http_port": server.http_port}
        name = f"[{host}]" if ":" in host else host
        text = "cameras and programs: %s:%d (gRPC); people: http://%s:%d/"
        log.info(text, name, server.port, name, server.http_port, extra=ports)
        return await _until_stopped(server)

    try:
        sys.exit(asyncio.run(serve()))
    except (CatalogueError, EngineError, ServerError) as error:
        log.error("%s", error)
        sys.exit(UNUSABLE)


@app.command()
def export(
    recording: Annotated[Path, typer.Argument(help="a segment (.vcseg), or a camera's folder of them")],
    film: Annotated[Path, typer.Argument(help="film to write, .mp4 (H.264)")],
    begin: Annotated[datetime | None, typer.Option("--from", help="capture time, UTC", formats=_TIMES)] = None,
    end: Annotated[datetime | None, typer.Option("--to", help="capture time, UTC; left out", formats=_TIMES)] = None,
    plain: Annotated[bool, typer.Option("--plain", help="faithful pictures, which classifiers can read")] = False,
    reconstructor: Reconstructors = None,
    engine: EngineName = "onnxruntime",
    threads: Threads = _CORES,
) -> None:
    """Write a recording as a film. A long one can be written in parts, by ranges of time."""
    try:
        from rich.progress import Progress

        from decoder.catalogue import SHIPPED, CatalogueError, load_catalogue
        from decoder.engines import EngineError
        from decoder.recordings.film import write_film
        from decoder.recordings.playback import Recording, RecordingError
    except ModuleNotFoundError as error:
        log.error("%s is missing: pip install 'veilcam[decoder]'", error.name)
        sys.exit(UNUSABLE)
    start_ns, end_ns = _ns(begin, 0), _ns(end, 2**63 - 1)
    if film.suffix != ".mp4":
        log.error("%s: expected a name that ends in .mp4", film)
        sys.exit(UNUSABLE)
    try:
        played = Recording(recording, load_catalogue(reconstructor or [SHIPPED], engine, threads), _RENDITION[plain])
        with Progress() as bar:
            task = bar.add_task(film.name, total=len(played.times(start_ns, end_ns)))
            count = write_film(played.shots(start_ns, end_ns), film, lambda: bar.advance(task))
    except (CatalogueError, EngineError, RecordingError) as error:
        log.error("%s", error)
        sys.exit(UNUSABLE)
    except OSError as error:
        log.error("%s: %s", error.filename or film, error.strerror)
        sys.exit(BROKE)
    except KeyboardInterrupt:
        log.error("interrupted; nothing was written")
        sys.exit(BROKE)
    log.info("%s: %d %s pictures", film, count, _RENDITION[plain])


def _ns(time: datetime | None, otherwise: int) -> int:
    return otherwise if time is None else int(time.replace(tzinfo=UTC).timestamp()) * 1_000_000_000


async def _until_stopped(server: "Server") -> int:
    asked = asyncio.Event()

    def ask() -> None:
        if asked.is_set():
            os._exit(BROKE)
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ask)
    stopped = asyncio.create_task(asked.wait())
    failed = asyncio.create_task(server.failed())
    await asyncio.wait([stopped, failed], return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
        log.error("a part of the service ended", exc_info=failed.exception())
    else:
        log.info("stopping; again to stop at once")
    failed.cancel()
    await server.stop()
    log.info("stopped")
    return 0 if asked.is_set() else BROKE


def _start_logging(as_json: bool) -> None:
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter("{asctime}{levelname}{name}{message}", style="{") if as_json else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
