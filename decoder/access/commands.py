"""``veilcam-decode keys``: certificates for the service and its cameras, made and renewed."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decoder.access import AccessError

if TYPE_CHECKING:
    from decoder.access.keys import Made

log = logging.getLogger("veilcam.decode")

UNUSABLE = 2
"""Exit code: what was asked for can't be done."""

keys = typer.Typer(no_args_is_help=True, help="Make and renew certificates: for the service, and one for each camera.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="folder of the authority")]
Hosts = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="name or address by which the server is reached; may be repeated"),
]


@keys.command("init")
def init_keys(
    folder: Folder,
    host: Hosts = None,
    camera: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a camera's name; may be repeated, and added later")
    ] = None,
    program: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a program that watches; may be repeated, and added later")
    ] = None,
) -> None:
    """Make an authority, a certificate for the service and one for each camera. Nothing is overwritten.

    The service's certificate names the hosts given, localhost and loopback's addresses. Keep DIR, above all its ca.key,
    where no one else reads it; a camera gets ca.pem and its own two files.
    """
    with _told():
        from decoder.access.keys import init

        _tell(init(folder, host or [], camera or [], program or []))
    log.info("service: --certificate %s/server.pem --key %s/server.key --client-ca %s/ca.pem", folder, folder, folder)
    log.info(
        "a camera: --ca ca.pem --certificate NAME.pem --key NAME.key, which it needs and nothing else of %s", folder
    )


@keys.command("camera")
def add_camera(folder: Folder, name: Annotated[str, typer.Argument(help="the camera's name")]) -> None:
    """Make a certificate for one camera more."""
    with _told():
        from decoder.access.keys import Authority

        _tell([Authority.open(folder).client("cameras", name)])


@keys.command("program")
def add_program(folder: Folder, name: Annotated[str, typer.Argument(help="the program's name")]) -> None:
    """Make a certificate for a program that watches over gRPC. It can't publish as a camera."""
    with _told():
        from decoder.access.keys import Authority

        _tell([Authority.open(folder).client("programs", name)])


@keys.command("renew")
def renew_keys(folder: Folder, host: Hosts = None) -> None:
    """Make all certificates anew for as long again, with the keys they have; a running service takes its own up.

    With --host, the service's certificate names those hosts, and loopback's, instead of the ones it has.
    """
    with _told():
        from decoder.access.keys import Authority

        _tell(Authority.open(folder).renew(host or []))


def _tell(made: "Sequence[Made]") -> None:
    for each in made:
        log.info("%s: valid until %s", each.path, each.until.strftime("%Y-%m-%d"))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What can't be done is a line and an exit code; so is what isn't installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        log.error("%s is missing: pip install 'veilcam[decoder]'", error.name)
        sys.exit(UNUSABLE)
    except AccessError as error:
        log.error("%s", error)
        sys.exit(UNUSABLE)
