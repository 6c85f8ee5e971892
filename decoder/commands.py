"""What the commands of ``veilcam-decode`` share: exit codes, options, how mistakes are told, how one stops."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from decoder.catalogue import Catalogue
    from decoder.server import Server
    from decoder.settings import Settings

log = logging.getLogger("veilcam.decode")

BROKE = 1
"""Exit code: the service broke while it ran."""
UNUSABLE = 2
"""Exit code: what was asked for can't be done (a missing file, a taken port, a bad option)."""

Reconstructors = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="reconstructor file, or a folder of them; may be repeated [the shipped ones]"),
]
EngineName = Annotated[
    str | None, typer.Option(help="runtime, as onnxruntime-int8; auto takes the fastest that agrees [auto]")
]
Threads = Annotated[int | None, typer.Option(help="threads of the engine [all cores]")]
AllowPlain = Annotated[
    bool | None,
    typer.Option(
        "--allow-plain",
        help="let viewers, with --users trusted ones, ask for plain pictures, which classifiers can read",
    ),
]


@contextlib.contextmanager
def extra_told() -> Iterator[None]:
    """What the service needs and the camera doesn't may not be installed: say how to."""
    try:
        yield
    except ModuleNotFoundError as error:
        log.error("%s is missing: pip install 'veilcam[decoder]'", error.name)
        sys.exit(UNUSABLE)


def give_up(error: Exception) -> NoReturn:
    """What was asked for can't be done: each line of why, and the exit code."""
    for line in str(error).splitlines():
        log.error("%s", line)
    sys.exit(UNUSABLE)


def open_catalogue(settings: "Settings", *renditions: str) -> "Catalogue":
    """The reconstructors that settings name, else the shipped ones, in the engine that they name.

    Args:
        renditions: that are wanted; all, if none is said.

    Raises:
        CatalogueError, EngineError: as ``load_catalogue`` has it.
    """
    from decoder.catalogue import SHIPPED, load_catalogue
    from decoder.model import RENDITIONS

    paths = settings.reconstructor or [SHIPPED]
    return load_catalogue(paths, settings.engine, settings.threads, renditions or RENDITIONS)


async def until_stopped(server: "Server", following: "asyncio.Task[None]") -> NoReturn:
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
