"""``veilcam-decode export`` and ``veilcam-decode replay``: recordings as films, and as if they were live."""

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from decoder.commands import (
    BROKE,
    UNUSABLE,
    AllowPlain,
    EngineName,
    Reconstructors,
    Threads,
    extra_told,
    give_up,
    open_catalogue,
    until_stopped,
)

if TYPE_CHECKING:
    from decoder.settings import Settings

log = logging.getLogger("veilcam.decode")

_ROUND_S = 1.0
"""What is replayed again and again, be it a single frame, takes so long at least."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
    with extra_told():
        from rich.progress import Progress

        from decoder.access.audit import made
        from decoder.catalogue import CatalogueError
        from decoder.engines import EngineError
        from decoder.recordings.film import free_part, write_film
        from decoder.recordings.playback import Place, Recording, RecordingError, find
        from decoder.settings import SettingsError
    rendition = "plain" if plain else "veiled"
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
        found, times = find(recording, start_ns, end_ns, place)  # before engines are measured, which takes a while
        settings = _own_settings({"reconstructor": reconstructor or None, "engine": engine, "threads": threads})
        played = Recording(found, open_catalogue(settings, rendition), rendition)
        with _stopping() as asked, Progress() as bar:
            if plain:
                made("export", played.segments[0].hello.camera, times[0], times[-1])
            task = bar.add_task(film.name, total=len(times))
            shots = played.shots(start_ns, end_ns, place)
            written = write_film(shots, film, lambda: bar.advance(task), asked)
    except (SettingsError, CatalogueError, EngineError, RecordingError) as error:
        give_up(error)
    except OSError as error:
        log.error("%s: %s", error.filename or film, error.strerror)
        sys.exit(BROKE)
    except KeyboardInterrupt:
        log.error("interrupted; nothing was written")
        sys.exit(BROKE)
    log.info("%s: %d %s pictures", written.path, written.pictures, rendition)
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
    with extra_told():
        from decoder.access.audit import made
        from decoder.catalogue import CatalogueError
        from decoder.engines import EngineError
        from decoder.model import RENDITIONS
        from decoder.recordings.playback import Recording, RecordingError, find
        from decoder.recordings.replay import replay as play
        from decoder.server import Server, ServerError
        from decoder.settings import MOST_PAYLOAD, MOST_PIXELS, SettingsError
    start_ns, end_ns = _range(begin, end)
    # The pace is this command's own, as fast as --speed says; and some service took what was recorded, however large.
    given: dict[str, Any] = {"port": port, "http": http, "allow_plain": allow_plain}
    given |= {"max_frame_rate": 0, "max_byte_rate": 0, "max_pixels": MOST_PIXELS, "max_payload": MOST_PAYLOAD}
    given |= {"reconstructor": reconstructor or None, "engine": engine, "threads": threads}

    async def serve() -> NoReturn:
        found, times = find(recording, start_ns, end_ns)
        settings = _own_settings(given)
        renditions = RENDITIONS[: 1 + settings.allow_plain]
        catalogue = open_catalogue(settings, *renditions)
        played = Recording(found, catalogue, *renditions)
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

        await until_stopped(server, asyncio.create_task(go_on()))

    try:
        asyncio.run(serve())
    except (SettingsError, CatalogueError, EngineError, RecordingError, ServerError) as error:
        give_up(error)


def _own_settings(given: Mapping[str, Any]) -> "Settings":
    """Settings of a command beside the service: what else the environment tells the service isn't for it."""
    from decoder.settings import PREFIX, read_settings

    names = [f"{PREFIX}{name.upper()}" for name in given]
    return read_settings(None, given, {name: os.environ[name] for name in names if name in os.environ})


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
