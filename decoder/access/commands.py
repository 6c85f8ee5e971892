"""``veilcam-decode keys`` and ``veilcam-decode users``: certificates, and who may watch."""

import contextlib
import getpass
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decoder.access import AccessError
from decoder.commands import UNUSABLE, extra_told

if TYPE_CHECKING:
    from decoder.access.keys import Made
    from decoder.access.people import Person

log = logging.getLogger("veilcam.decode")

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
        with extra_told():
            yield
    except AccessError as error:
        log.error("%s", error)
        sys.exit(UNUSABLE)


users_app = typer.Typer(
    no_args_is_help=True, help="People and programs that may watch: who they are, and what they see."
)

Name = Annotated[str, typer.Argument(help="of a person or a program")]
File = Annotated[
    Path | None,
    typer.Option("--users", metavar="FILE", envvar="VEILCAM_USERS", help="the service's file of users"),
]
Config = Annotated[
    Path | None, typer.Option(envvar="VEILCAM_CONFIG", help="the service's settings, which may name that file")
]


@users_app.command("add")
def add_user(
    name: Name,
    role: Annotated[str, typer.Option(help="viewer: veiled pictures; trusted: plain ones too; admin: all cameras")],
    camera: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="given to them; may be repeated; * is all")
    ] = None,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="none, or no longer: programs have tokens or a certificate")
    ] = False,
    file: File = None,
    config: Config = None,
) -> None:
    """Add someone, or change role and cameras of someone. Of who is new, a password is asked: typed, or from a pipe."""
    with _told():
        from dataclasses import replace

        from decoder.access.people import Person, check_names, hash_password
        from decoder.access.roles import GIVEN, Role

        path = _file(file, config)
        if role not in GIVEN:
            hint = "; cameras have certificates: veilcam-decode keys camera" if role == "camera" else ""
            raise AccessError(f"--role {role!r}: expected one of {', '.join(GIVEN)}{hint}")
        check_names("NAME", name)
        check_names("--camera", *(each for each in camera or [] if each != "*"))
        if not camera and role != "admin":
            raise AccessError(f"--camera: a {role} sees those cameras that are given; name one, or '*' for all")
        added = None
        if name not in _people(path, new=True):
            added = Person(name, Role(role), password=None if no_password else hash_password(_password()))
        with _changed(path, new=True) as people:
            person = people.get(name) or added
            if person is None:
                raise AccessError(f"{path}: {name} was removed meanwhile; nothing was changed")
            password = None if no_password else person.password
            people[name] = replace(person, role=Role(role), cameras=frozenset(camera or []), password=password)
        log.info("%s: %s is %s of %s", path, name, role, ", ".join(camera or ["*"]))


@users_app.command("password")
def change_password(name: Name, file: File = None, config: Config = None) -> None:
    """Set a password, typed or from a pipe. Whoever is signed in with the old one has to sign in again."""
    with _told():
        from dataclasses import replace

        from decoder.access.people import hash_password

        path = _file(file, config)
        _known(_people(path), name, path)
        password = hash_password(_password())
        with _changed(path) as people:
            people[name] = replace(_known(people, name, path), password=password)


@users_app.command("token")
def make_token(
    name: Name,
    label: Annotated[str, typer.Option(help="to tell tokens apart; one there is by that label is replaced")] = "token",
    revoke: Annotated[
        bool, typer.Option("--revoke", help="make none, and let the one there is hold no longer")
    ] = False,
    file: File = None,
    config: Config = None,
) -> None:
    """Print a new token for a program. It is kept hashed: this is the only time that it is shown."""
    with _told():
        from dataclasses import replace

        from decoder.access.people import check_names, hash_token, new_token

        check_names("--label", label)
        path = _file(file, config)
        token = new_token()
        with _changed(path) as people:
            person = _known(people, name, path)
            kept = {each: digest for each, digest in person.tokens.items() if each != label}
            if revoke and label not in person.tokens:
                raise AccessError(f"--label {label}: {name} has no such token")
            people[name] = replace(person, tokens=kept if revoke else kept | {label: hash_token(token)})
        if not revoke:
            typer.echo(token)


@users_app.command("remove")
def remove_user(name: Name, file: File = None, config: Config = None) -> None:
    """Remove someone. A running service lets them go at once."""
    with _told():
        path = _file(file, config)
        with _changed(path) as people:
            del people[_known(people, name, path).name]


@users_app.command("list")
def list_users(file: File = None, config: Config = None) -> None:
    """Tell who there is."""
    with _told():
        for person in _people(_file(file, config)).values():
            cameras = "*" if person.seen is None else ", ".join(sorted(person.cameras))
            ways = [*(["password"] if person.password else []), *(f"token {label!r}" for label in person.tokens)]
            typer.echo(f"{person.name}: {person.role}; cameras {cameras}; {', '.join(ways) or 'no password, no token'}")


def _file(file: Path | None, config: Path | None) -> Path:
    from decoder.settings import SettingsError, read_settings

    try:
        found = file or (read_settings(config, {}, {}).users if config is not None else None)
    except SettingsError as error:
        raise AccessError(str(error)) from None
    if found is None:
        raise AccessError("--users FILE: which file? (or VEILCAM_USERS, or --config with users in it)")
    return found


def _people(path: Path, new: bool = False) -> "dict[str, Person]":
    from decoder.access.people import read_people

    return {} if new and not path.exists() else read_people(path)


@contextlib.contextmanager
def _changed(path: Path, new: bool = False) -> "Iterator[dict[str, Person]]":
    """Those in the file, to be changed and then written, while no other of these commands does the same."""
    from decoder.access.people import write_people
    from decoder.private import changed_by_one

    with contextlib.ExitStack() as alone:
        try:
            alone.enter_context(changed_by_one(path.parent))
        except OSError as error:
            raise AccessError(f"{path}: can't be written ({path.parent}: {error.strerror})") from None
        people = _people(path, new)
        yield people
        write_people(path, people)


def _known(people: "dict[str, Person]", name: str, path: Path) -> "Person":
    if name not in people:
        raise AccessError(f"{path}: no {name[:80]!r} in it (there are {', '.join(people) or 'none yet'})")
    return people[name]


def _password() -> str:
    """Typed twice and not shown, or the first line of what is piped in."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    first = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != first:
        raise AccessError("password: not the same twice")
    return first
