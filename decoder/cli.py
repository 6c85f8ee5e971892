"""``veilcam-decode``: take cameras' measurements, rebuild pictures, show them."""

import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pythonjsonlogger.json import JsonFormatter

from decoder.access import AccessError
from decoder.access.commands import keys, users_app

if TYPE_CHECKING:
    from decoder.catalogue import Catalogue
    from decoder.server import Server
    from decoder.settings import Settings

log = logging.getLogger("veilcam.decode")

BROKE = 1
"""Exit code: the service broke while it ran."""
UNUSABLE = 2
"""Exit code: what was asked for can't be done (a missing file, a taken port, a bad option)."""

_LOOK_EVERY_S = 2.0
_ROUND_S = 1.0
"""What is replayed again and again, be it a single frame, takes so long at least."""
_PLAIN_ALLOWED = "--allow-plain: %s may ask for plain pictures, which classifiers can read"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RENDITION = {False: "veiled", True: "plain"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(keys, name="keys")
app.add_typer(users_app, name="users")


def main() -> None:
    """Entry point of the command."""
    app()


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"veilcam {version('veilcam')}")
        raise typer.Exit


Reconstructors = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="reconstructor file, or a folder of them; may be repeated [the shipped ones]"),
]
EngineName = Annotated[
    str | None, typer.Option(help="runtime, as onnxruntime-int8; auto takes the fastest that agrees [auto]")
]
Threads = Annotated[int | None, typer.Option(help="threads of the engine [all cores]")]


def _time(text: str) -> datetime:
    """A date, or a date and a time, as ISO 8601 has it: UTC, unless it names an offset."""
    try:
        read = datetime.fromisoformat(text)
        return read.astimezone(UTC) if read.tzinfo else read.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r}: expected a time as 2026-11-25T08:00:00, UTC") from None


Begin = Annotated[
    datetime | None,
    typer.Option("--from", metavar="TIME", parser=_time, help="capture time, as 2026-11-25T08:00:00, UTC"),
]
End = Annotated[datetime | None, typer.Option("--to", metavar="TIME", parser=_time, help="capture time, UTC; left out")]
AllowPlain = Annotated[
    bool | None,
    typer.Option(
        "--allow-plain",
        help="let viewers, with --users trusted ones, ask for plain pictures, which classifiers can read",
    ),
]
Megabytes = Annotated[int | None, typer.Option(help="keep so much of them at most [no limit]")]


@app.callback(invoke_without_command=True)
def decode(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(envvar="VEILCAM_CONFIG", help="TOML file with these options' names, - as _; changes are taken up"),
    ] = None,
    check_config: Annotated[bool, typer.Option("--check-config", help="check all settings and end")] = False,
    port: Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one [50051]")] = None,
    http: Annotated[int | None, typer.Option(help="port of the web page; 0 takes a free one [8080]")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on [127.0.0.1]")] = None,
    certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="certificate of this service: TLS on both ports [none]")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="FILE", help="its key")] = None,
    client_ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="authority whose certificates cameras and programs must show")
    ] = None,
    users: Annotated[
        str | None, typer.Option(metavar="FILE", help="people and programs with their roles [everyone is let in]")
    ] = None,
    trusted_proxy: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="reverse proxy whose X-Forwarded-For says who asks for the page [none]"),
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="listen beyond loopback also without TLS and authentication")
    ] = None,
    reconstructor: Reconstructors = None,
    engine: EngineName = None,
    threads: Threads = None,
    batch: Annotated[int | None, typer.Option(help="frames in an engine at once, at most [16]")] = None,
    save: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="save pictures as they are shown: DIR/CAMERA/CAPTURETIME-SEQUENCE.png"),
    ] = None,
    record: Annotated[
        str | None, typer.Option(metavar="DIR", help="record measurements as they come: DIR/CAMERA/CAPTURETIME.vcseg")
    ] = None,
    record_hours: Annotated[float | None, typer.Option(help="delete recordings that came longer ago [kept]")] = None,
    record_megabytes: Megabytes = None,
    record_free: Annotated[
        int | None, typer.Option(help="megabytes of the disk that recordings leave free [1024]")
    ] = None,
    allow_plain: AllowPlain = None,
    max_cameras: Annotated[int | None, typer.Option(help="cameras at most [64]")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="pixels of a picture at most [4096×2304]")] = None,
    max_payload: Annotated[int | None, typer.Option(help="bytes of a frame at most [8 MiB]")] = None,
    max_connections: Annotated[int | None, typer.Option(help="calls and requests at one time [512]")] = None,
    max_peer_streams: Annotated[
        int | None, typer.Option(help="calls and connections of one certificate's name or address [128]")
    ] = None,
    max_http: Annotated[int | None, typer.Option(help="connections of the page at one time [384]")] = None,
    max_frame_rate: Annotated[
        float | None, typer.Option(help="frames a second that a camera is read, at most; 0 sets no limit [240]")
    ] = None,
    max_byte_rate: Annotated[
        int | None, typer.Option(help="bytes a second that a camera is read, at most; 0 sets no limit [32 MiB]")
    ] = None,
    silent_seconds: Annotated[
        float | None, typer.Option(help="a camera that publishes nothing for so long is let go [300]")
    ] = None,
    request_seconds: Annotated[
        float | None, typer.Option(help="in which a request of the page must be there as a whole [10]")
    ] = None,
    idle_seconds: Annotated[
        int | None, typer.Option(help="connections on which nothing is asked for so long are ended [30]")
    ] = None,
    on_change: Annotated[
        str | None,
        typer.Option(metavar="URL|COMMAND", help="told when a camera's state changes: POST of JSON, or run [none]"),
    ] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="log lines as JSON")] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="tell the version and end")
    ] = False,
) -> None:
    """Serve cameras and viewers until Ctrl-C; a second Ctrl-C ends at once.

    Every option can also stand in --config FILE, or in the environment as VEILCAM_NAME; what is said here goes first.

    Exit codes: 0 stopped; 1 the service broke while it ran; 2 what was asked for can't be done.
    """
    _start_logging(bool(log_json))
    if context.invoked_subcommand is not None:
        return
    # gRPC's core writes lines of its own beside ours; it reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with _extra_told():
        from decoder.access.exposure import check_exposure, is_loopback, lacking_guards
        from decoder.access.people import People
        from decoder.access.tls import Certificates
        from decoder.catalogue import CatalogueError
        from decoder.engines import REFERENCE, EngineError
        from decoder.server import Server, ServerError
        from decoder.settings import Settings, SettingsError, read_settings
    said = {name: context.params[name] for name in Settings.model_fields}
    given = {name: value for name, value in said.items() if value not in (None, [], ())}
    try:
        settings = read_settings(config, given)
        _start_logging(settings.log_json)
        check_exposure(settings)
        if check_config and settings.certificate is not None:
            Certificates(settings)
        if check_config and settings.users is not None:
            People(settings.users)
        _check_disks(settings)
        # A check doesn't look for the fastest engine: that takes as long as a start, and the start does it anyway.
        unmeasured = check_config and settings.engine == "auto"
        catalogue = _catalogue(settings.model_copy(update={"engine": REFERENCE}) if unmeasured else settings)
    except (SettingsError, AccessError, CatalogueError, EngineError) as error:
        _give_up(error)
    if check_config:
        log.info("settings are sound: %s", ", ".join(f"{k} = {v}" for k, v in settings.model_dump(mode="json").items()))
        return

    async def serve() -> NoReturn:
        server = Server(catalogue, settings)
        await server.start()
        if settings.record:
            log.info("recording measurements into %s", settings.record)
        _tell_reconstructors(catalogue)
        if settings.allow_plain:
            log.warning(_PLAIN_ALLOWED, "trusted users and admins" if settings.users else "everyone")
        if settings.users is not None and settings.client_ca is None:
            log.warning("--users without --client-ca: no camera can show who it is, so none is let in")
        if not is_loopback(settings.host) and (lacking := lacking_guards(settings)):
            text = "--insecure: listening on %s without %s: everyone who reaches it can watch, or publish"
            log.warning(text, settings.host, ", ".join(lacking))
        ports = {"grpc_port": server.port, "http_port": server.http_port}
        name = _reached_as(settings)
        text = "cameras and programs: %s:%d (gRPC); people: %s://%s:%d/"
        scheme = "http" if settings.certificate is None else "https"
        log.info(text, name, server.port, scheme, name, server.http_port, extra=ports)
        await _until_stopped(server, asyncio.create_task(_follow(server, config, given)))

    try:
        asyncio.run(serve())
    except (AccessError, ServerError) as error:
        _give_up(error)


def _reached_as(settings: "Settings") -> str:
    """The host in the addresses that are told: one that a browser can use, and finds in the certificate."""
    from decoder.access.exposure import is_everywhere
    from decoder.access.tls import names_in

    if not is_everywhere(settings.host):
        return f"[{settings.host}]" if ":" in settings.host else settings.host
    named = names_in(settings.certificate.read_bytes()) if settings.certificate is not None else ()
    return next((each for each in named if "*" not in each), socket.gethostname())


async def _follow(server: "Server", config: Path | None, given: Mapping[str, Any]) -> None:
    """Take up changes of the settings file as they come, and after SIGHUP, with the reconstructors' files, anyway."""
    from decoder.catalogue import CatalogueError
    from decoder.engines import EngineError
    from decoder.settings import SettingsError, changed, read_settings

    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
    seen = _stamp(config)
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), _LOOK_EVERY_S)
        if not asked.is_set() and _stamp(config) == seen:
            continue
        anyway = asked.is_set()
        asked.clear()
        seen = _stamp(config)
        try:
            after = read_settings(config, given)
            names = changed(server.settings, after)
            _check_disks(after)
            if not names and not anyway:
                continue
            catalogue = None
            if anyway or {"reconstructor", "engine", "threads"} & set(names):
                catalogue = await asyncio.to_thread(_catalogue, after)
        except (SettingsError, CatalogueError, EngineError) as error:
            for line in str(error).splitlines():
                log.error("settings stay as they were: %s", line)
            continue
        later = server.apply(after, catalogue)
        told = [f"{name} = {getattr(after, name)}" for name in names if name not in later]
        log.info("settings taken up: %s", ", ".join(told) or "none changed")
        if catalogue is not None:
            _tell_reconstructors(catalogue)
        if "allow_plain" in names and after.allow_plain:
            log.warning(_PLAIN_ALLOWED, "trusted users and admins" if after.users else "everyone")
        if later:
            log.warning("settings that wait for the next start: %s", ", ".join(later))


def _stamp(config: Path | None) -> tuple[int, int] | None:
    try:
        told = config.stat() if config is not None else None
    except OSError:
        return None
    return (told.st_mtime_ns, told.st_size) if told is not None else None


def _check_disks(settings: "Settings") -> None:
    """Refuse folders that can't be written, and to leave more of a disk free than there is of it.

    Raises:
        SettingsError: it is so.
    """
    from decoder.private import check_folder
    from decoder.settings import SettingsError

    for name, folder in (("save", settings.save), ("record", settings.record)):
        if folder is None:
            continue
        try:
            there = check_folder(folder)
            size = shutil.disk_usage(there).total >> 20
        except OSError as error:
            raise SettingsError(f"--{name} {folder}: can't be written ({error.strerror})") from None
        if name == "record" and settings.record_free >= max(size, 1):
            free = f"--record-free {settings.record_free}: expected megabytes, fewer than the disk of {folder} has"
            raise SettingsError(f"{free} in all ({size}); all recordings would be deleted")


def _catalogue(settings: "Settings", renditions: Collection[str] = tuple(_RENDITION.values())) -> "Catalogue":
    from decoder.catalogue import SHIPPED, load_catalogue

    return load_catalogue(settings.reconstructor or [SHIPPED], settings.engine, settings.threads, renditions)


def _own_settings(given: Mapping[str, Any]) -> "Settings":
    """Settings of a command beside the service: what else the environment tells the service isn't for it."""
    from decoder.settings import PREFIX, read_settings

    names = [f"{PREFIX}{name.upper()}" for name in given]
    return read_settings(None, given, {name: os.environ[name] for name in names if name in os.environ})


def _tell_reconstructors(catalogue: "Catalogue") -> None:
    for each in catalogue.reconstructors:
        log.info(
            "reconstructor %s (%s): id %s, operator %s, %d rows; engine %s on %s, %d threads",
            *(each.name, each.rendition, each.id, each.operator_id, each.engine.rows),
            *(each.engine.name, each.engine.device, each.engine.threads),
        )


@app.command()
def export(
    recording: Annotated[Path, typer.Argument(help="a segment (.vcseg), or a camera's folder of them")],
    film: Annotated[Path, typer.Argument(help="film to write, .mp4 (H.264)")],
    begin: Begin = None,
    end: End = None,
    go_on: Annotated[
        str | None, typer.Option(metavar="SEGMENT:SEQUENCE", help="begin where an export that was stopped told to")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="faithful pictures, which classifiers can read")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a film that is there")] = False,
    reconstructor: Reconstructors = None,
    engine: EngineName = None,
    threads: Threads = None,
) -> None:
    """Write a recording as a film. A long one can be written in parts, by ranges of time.

    After Ctrl-C, what is done is a film of its own, FILM.part1.mp4 (or part2, if that is there), and the command that
    goes on from there is told; a second Ctrl-C ends at once, with nothing written. FILM itself is there only when it is
    whole.

    Exit codes: 0 it is whole; 1 it was stopped, or can't be written; 2 what was asked for can't be done.
    """
    with _extra_told():
        from rich.progress import Progress

        from decoder.access.audit import made
        from decoder.catalogue import CatalogueError
        from decoder.engines import EngineError
        from decoder.recordings.film import free_part, write_film
        from decoder.recordings.playback import Place, Recording, RecordingError, times_of
        from decoder.settings import SettingsError
    start_ns, end_ns = _range(begin, end)
    try:
        place = Place.read(go_on) if go_on is not None else Place()
    except ValueError as error:
        log.error("--go-on %s", error)
        sys.exit(UNUSABLE)
    if (problem := _unwritable(film, overwrite)) is not None:
        log.error("%s: %s", film, problem)
        sys.exit(UNUSABLE)
    try:
        times = times_of(recording, start_ns, end_ns, place)  # before engines are measured, which takes a while
        settings = _own_settings({"reconstructor": reconstructor or None, "engine": engine, "threads": threads})
        played = Recording(recording, _catalogue(settings, [_RENDITION[plain]]), _RENDITION[plain])
        with _stopping() as asked, Progress() as bar:
            if plain:
                made("export", played.segments[0].hello.camera, times[0], times[-1])
            task = bar.add_task(film.name, total=len(times))
            shots = played.shots(start_ns, end_ns, place)
            written = write_film(shots, film, lambda: bar.advance(task), asked)
    except (SettingsError, CatalogueError, EngineError, RecordingError) as error:
        _give_up(error)
    except OSError as error:
        log.error("%s: %s", error.filename or film, error.strerror)
        sys.exit(BROKE)
    except KeyboardInterrupt:
        log.error("interrupted; nothing was written")
        sys.exit(BROKE)
    log.info("%s: %d %s pictures", written.path, written.pictures, _RENDITION[plain])
    if written.rest is not None:
        again = ["veilcam-decode", "export", str(recording), str(free_part(written.path))]
        again += ["--go-on", str(written.rest)]
        again += ["--from", begin.replace(tzinfo=None).isoformat()] if begin is not None else []
        again += ["--to", end.replace(tzinfo=None).isoformat()] if end is not None else []
        again += ["--plain"] if plain else []
        again += [word for each in reconstructor or [] for word in ("--reconstructor", str(each))]
        again += ["--engine", engine] if engine is not None else []
        again += ["--threads", str(threads)] if threads is not None else []
        log.error("stopped before the end; to go on: %s", shlex.join(again))
        sys.exit(BROKE)


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(help="a segment (.vcseg), or a camera's folder of them")],
    begin: Begin = None,
    end: End = None,
    speed: Annotated[float, typer.Option(min=0.01, max=1000, help="2 plays twice as fast")] = 1.0,
    loop: Annotated[bool, typer.Option("--loop", help="begin again at the end")] = False,
    port: Annotated[int | None, typer.Option(help="gRPC port [a free one]")] = 0,
    http: Annotated[int | None, typer.Option(help="port of the web page [a free one]")] = 0,
    allow_plain: AllowPlain = None,
    reconstructor: Reconstructors = None,
    engine: EngineName = None,
    threads: Threads = None,
) -> None:
    """Show a recording on a page of its own, and to programs, as if its camera were live, until Ctrl-C."""
    with _extra_told():
        from decoder.access.audit import made
        from decoder.catalogue import CatalogueError
        from decoder.engines import EngineError
        from decoder.recordings.playback import Recording, RecordingError, times_of
        from decoder.recordings.replay import replay as play
        from decoder.server import Server, ServerError
        from decoder.settings import SettingsError
    start_ns, end_ns = _range(begin, end)
    # The pace is this command's own, as fast as --speed says.
    given: dict[str, Any] = {"port": port, "http": http, "allow_plain": allow_plain}
    given |= {"max_frame_rate": 0, "max_byte_rate": 0}
    given |= {"reconstructor": reconstructor or None, "engine": engine, "threads": threads}

    async def serve() -> NoReturn:
        times = times_of(recording, start_ns, end_ns)
        settings = _own_settings(given)
        renditions = list(_RENDITION.values())[: 1 + settings.allow_plain]
        catalogue = _catalogue(settings, renditions)
        played = Recording(recording, catalogue, *renditions)
        if settings.allow_plain:
            made("replay", played.segments[0].hello.camera, times[0], times[-1])
        server = Server(catalogue, settings)
        await server.start()
        ports = {"grpc_port": server.port, "http_port": server.http_port}
        log.info("%s: watch it: http://127.0.0.1:%d/", recording, server.http_port, extra=ports)

        async def go_on() -> None:
            while True:
                sent, soonest = 0, time.monotonic() + _ROUND_S

                def count() -> None:
                    nonlocal sent
                    sent += 1

                await play(played.segments, f"127.0.0.1:{server.port}", speed, start_ns, end_ns, count)
                if not sent:
                    raise RecordingError(f"{recording}: no frame in that range of time can be played")
                log.info("%s: played %d frames%s", recording, sent, "; again" if loop else "")
                if not loop:
                    await asyncio.Event().wait()
                await asyncio.sleep(soonest - time.monotonic())

        await _until_stopped(server, asyncio.create_task(go_on()))

    try:
        asyncio.run(serve())
    except (SettingsError, CatalogueError, EngineError, RecordingError, ServerError) as error:
        _give_up(error)


@contextlib.contextmanager
def _extra_told() -> Iterator[None]:
    """What the service needs and the camera doesn't may not be installed: say how to."""
    try:
        yield
    except ModuleNotFoundError as error:
        log.error("%s is missing: pip install 'veilcam[decoder]'", error.name)
        sys.exit(UNUSABLE)


def _give_up(error: Exception) -> NoReturn:
    """What was asked for can't be done: each line of why, and the exit code."""
    for line in str(error).splitlines():
        log.error("%s", line)
    sys.exit(UNUSABLE)


def _range(begin: datetime | None, end: datetime | None) -> tuple[int, int]:
    """From when to when, in ns since 1970, the end left out."""
    if begin is not None and end is not None and end <= begin:
        log.error("--to %s: expected a time after --from %s", end, begin)
        sys.exit(UNUSABLE)
    return _ns(begin, 0), _ns(end, 2**63 - 1)


def _unwritable(film: Path, overwrite: bool) -> str | None:
    """Why a film can't be written there, as far as it shows before."""
    if film.suffix != ".mp4":
        return "expected a name that ends in .mp4"
    if not film.parent.is_dir():
        return f"{film.parent} is no folder"
    if film.exists() and not overwrite:
        return "is there already: another name, or --overwrite"
    return None


def _ns(time: datetime | None, otherwise: int) -> int:
    return otherwise if time is None else (time - _EPOCH) // timedelta(microseconds=1) * 1000


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether it was asked to stop, by Ctrl-C or SIGTERM; asked again, it is interrupted, and then left to clean up."""
    asked = 0

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _until_stopped(server: "Server", following: "asyncio.Task[None]") -> NoReturn:
    """Serve until a signal, or until a part ends that should not have; then end the process, with its exit code.

    At its ordinary end, Python would wait for every thread: for ever, if one hangs on a disk or a device.
    """
    from decoder.recordings.playback import RecordingError

    asked = asyncio.Event()

    def ask() -> None:
        if asked.is_set():
            os._exit(BROKE)
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ask)
    stopped = asyncio.create_task(asked.wait())
    failed = asyncio.create_task(server.failed())
    await asyncio.wait([stopped, failed, following], return_when=asyncio.FIRST_COMPLETED)
    broken = next((task for task in (failed, following) if task.done()), None)
    problem = broken.exception() if broken else None
    if broken is None:
        log.info("stopping; again to stop at once")
    elif not isinstance(problem, RecordingError):
        log.error("a part of the service ended", exc_info=problem)
    failed.cancel()
    following.cancel()
    await server.stop()
    log.info("stopped")
    code = 0 if asked.is_set() else BROKE
    if isinstance(problem, RecordingError):
        code = UNUSABLE
        log.error("%s", problem)
    logging.shutdown()
    os._exit(code)


def _start_logging(as_json: bool) -> None:
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter("{asctime}{levelname}{name}{message}", style="{") if as_json else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings name no caller; the page's door has its own
