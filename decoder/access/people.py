"""People and programs: a TOML file that only its owner reads, followed while the service runs.

```toml
[users."anna"]
role = "viewer"            # viewer, trusted or admin
cameras = ["porch"]        # "*" is all
password = "$argon2id$…"   # none: she can't sign in, her tokens work
[users."anna".tokens]
"phone" = "…"              # SHA-256 of the token
```
"""

import hashlib
import json
import logging
import os
import secrets
import threading
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from decoder.access import AccessError
from decoder.access.roles import Role
from decoder.private import replace_file
from protos.rules import CAMERA_NAME, CAMERA_NAME_TOLD

log = logging.getLogger("veilcam.decode")

SHORTEST_PASSWORD = 10
LONGEST_PASSWORD = 512
_HASHER = PasswordHasher()
_NO_ONES = _HASHER.hash(secrets.token_urlsafe())
"""Looked at for names that aren't here: they take as long as those that are."""


@dataclass(frozen=True)
class Person:
    """Someone in the file."""

    name: str
    role: Role
    cameras: frozenset[str] = frozenset()
    password: str | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def seen(self) -> frozenset[str] | None:
        """Cameras that they see; all, if None."""
        return None if self.role is Role.ADMIN or "*" in self.cameras else self.cameras


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["viewer", "trusted", "admin"]
    cameras: list[str] = []
    password: Annotated[str | None, Field(pattern=r"^\$argon2id\$")] = None
    tokens: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = {}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    users: dict[Annotated[str, Field(pattern=f"^{CAMERA_NAME.pattern}$")], _Entry] = {}


class People:
    """Those of a file, as it is now. One that can't be read or is damaged changes nothing and is told in the log.

    Raises:
        AccessError: it can't be read at the start.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._take(read_people(file))
        self._tell_owner()

    def get(self, name: str) -> Person | None:
        self._look()
        return self._people.get(name)

    def by_token(self, token: str) -> Person | None:
        self._look()
        return self._tokens.get(hash_token(token))

    def _take(self, people: dict[str, Person]) -> None:
        self._people = people
        self._tokens = {digest: person for person in people.values() for digest in person.tokens.values()}

    def _look(self) -> None:
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            self._seen = stamp
            try:
                self._take(read_people(self._file))
            except AccessError as error:
                log.error("users stay as they were: %s", error)
            else:
                log.info("users taken up: %s", ", ".join(self._people) or "none")
                self._tell_owner()

    def _tell_owner(self) -> None:
        """Only root can read a file of someone else's that nobody else may read: whoever owns it lets people in."""
        try:
            owner = self._file.stat().st_uid
        except OSError:  # replaced or removed this moment: told of when it is looked at next
            return
        if owner not in (0, os.geteuid()):
            log.warning("%s: belongs to user %d, who can let anyone in (chown root %s)", self._file, owner, self._file)

    def _stamp(self) -> tuple[int, int, int, int] | None:
        try:
            told = self._file.stat()
        except OSError:
            return None
        return told.st_mtime_ns, told.st_size, told.st_ino, told.st_mode


def read_people(file: Path) -> dict[str, Person]:
    """By name.

    Raises:
        AccessError: a file that isn't there, that others may read, or that isn't what it should be.
    """
    try:
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_mode & 0o077:
                raise AccessError(f"{file}: others may read or write it (chmod 600 {file})")
            read = _File.model_validate(tomllib.load(opened))
    except OSError as error:
        raise AccessError(f"{file}: can't be read ({error.strerror}); veilcam-decode users add makes it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AccessError(f"{file}: not TOML ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise AccessError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return {
        name: Person(name, Role(entry.role), frozenset(entry.cameras), entry.password, entry.tokens)
        for name, entry in read.users.items()
    }


def write_people(file: Path, people: Mapping[str, Person]) -> None:
    """In one step, for its owner alone, who stays the same: a service that could read it still can.

    Raises:
        AccessError: it can't be written, or not for its owner.
    """
    lines = ["# Written by veilcam-decode users. A running service takes changes up; comments don't last."]
    for person in people.values():
        name = _quoted(person.name)
        lines += ["", f"[users.{name}]", f"role = {_quoted(person.role)}"]
        lines += [f"cameras = [{', '.join(map(_quoted, sorted(person.cameras)))}]"]
        lines += [f"password = {_quoted(person.password)}"] if person.password else []
        if person.tokens:
            lines += [f"[users.{name}.tokens]"]
            lines += [f"{_quoted(label)} = {_quoted(digest)}" for label, digest in person.tokens.items()]
    try:
        replace_file(file, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise AccessError(f"{file}: can't be written ({error.strerror})") from None


def _quoted(text: str) -> str:
    """A string of TOML: as JSON has it, but that DEL is escaped, and nothing is written as a pair of surrogates."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_names(option: str, *names: str) -> None:
    """Refuse what can't be a name.

    Raises:
        AccessError: it names the option.
    """
    for name in names:
        if not CAMERA_NAME.fullmatch(name):
            raise AccessError(f"{option} {name[:80]!r}: expected {CAMERA_NAME_TOLD}")


def hash_password(password: str) -> str:
    """What the file keeps.

    Raises:
        AccessError: too short, or far too long.
    """
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise AccessError(f"password: expected {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters")
    return _HASHER.hash(password)


def right_password(person: Person | None, password: str) -> bool:
    """Takes some 50 ms and 64 MiB, whether there is such a person or not."""
    try:
        kept = person.password if person is not None else None
        return _HASHER.verify(kept or _NO_ONES, password) and kept is not None
    except (Argon2Error, InvalidHashError):
        return False


def new_token() -> str:
    """256 random bits, which no one guesses: a fast hash keeps them well enough."""
    return f"vc_{secrets.token_urlsafe(32)}"


def hash_token(token: str) -> str:
    """What the file keeps."""
    return hashlib.sha256(token.encode()).hexdigest()
