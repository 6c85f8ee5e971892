"""``veilcam-decode``: take cameras' measurements, rebuild pictures, show them."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pythonjsonlogger.json import JsonFormatter

from decoder.access import AccessError
from decoder.access.commands import keys, users_app
from decoder.commands import (
    AllowPlain,
    EngineName,
    Reconstructors,
    Threads,
    extra_told,
    give_up,
    open_catalogue,
    until_stopped,
)
from decoder.recordings.commands import export, replay

if TYPE_CHECKING:
    from decoder.catalogue import Catalogue
    from decoder.server import Server
    from decoder.settings import Settings

log = logging.getLogger("veilcam.decode")

_LOOK_EVERY_S = 2.0
_PLAIN_ALLOWED = "--allow-plain: %s may ask for plain pictures, which classifiers can read"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(export)
app.command()(replay)
app.add_typer(keys, name="keys")
app.add_typer(users_app, name="users")


def main() -> None:
    """Entry point of the command."""
    app()


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"veilcam {version('veilcam')}")
        raise typer.Exit


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
    with extra_told():
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
        catalogue = open_catalogue(settings.model_copy(update={"engine": REFERENCE}) if unmeasured else settings)
    except (SettingsError, AccessError, CatalogueError, EngineError) as error:
        give_up(error)
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
            if all(each.rendition != "plain" for each in catalogue.reconstructors):
                log.warning("--allow-plain: none of --reconstructor is plain, so there are none")
        elif all(each.rendition == "plain" for each in catalogue.reconstructors):
            log.warning("all of --reconstructor are plain, without --allow-plain no camera gets a picture by them")
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
        await until_stopped(server, asyncio.create_task(_follow(server, config, given)))

    try:
        asyncio.run(serve())
    except (AccessError, ServerError) as error:
        give_up(error)


def _reached_as(settings: "Settings") -> str:
    """The host in the addresses that are told: one that a browser can use, and finds in the certificate."""
    from decoder.access.exposure import is_everywhere, is_loopback
    from decoder.access.tls import hosts_in

    name = settings.host
    if is_everywhere(name):
        named = hosts_in(settings.certificate.read_bytes()) if settings.certificate is not None else ()
        listened = [each for each in named if ":" in name or ":" not in each]  # all of IPv4 is no address of IPv6
        name = next((each for each in listened if "*" not in each and not is_loopback(each)), socket.gethostname())
    return f"[{name}]" if ":" in name else name


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
            await asyncio.to_thread(_check_disks, after)  # a disk of the network may hang, and no camera with it
            if not names and not anyway:
                continue
            catalogue = None
            if anyway or {"reconstructor", "engine", "threads"} & set(names):
                catalogue = await asyncio.to_thread(open_catalogue, after)
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


def _tell_reconstructors(catalogue: "Catalogue") -> None:
    for each in catalogue.reconstructors:
        log.info(
            "reconstructor %s (%s): id %s, operator %s, %d rows; engine %s on %s, %d threads",
            *(each.name, each.rendition, each.id, each.operator_id, each.engine.rows),
            *(each.engine.name, each.engine.device, each.engine.threads),
        )


def _start_logging(as_json: bool) -> None:
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter("{asctime}{levelname}{name}{message}", style="{") if as_json else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings name no caller; the page's door has its own
