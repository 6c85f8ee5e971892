"""What a decoder service is told: one TOML file, the environment and the command line, checked as a whole."""

import difflib
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

PREFIX = "VEILCAM_"
_CONFIG = f"{PREFIX}CONFIG"
"""Names the settings file, and is no setting itself."""
_CORES = os.cpu_count() or 1
MOST_PIXELS = 1 << 28
MOST_PAYLOAD = 64 << 20
"""To which ``max_pixels`` and ``max_payload`` may be raised."""

_PLACES = ("certificate", "key", "client_ca", "users", "save", "record")
AT_ONCE = (
    *("allow_plain", "max_cameras", "max_pixels", "reconstructor", "engine", "threads", "batch"),
    *("record_hours", "record_megabytes", "record_free"),
    *("max_frame_rate", "max_byte_rate", "silent_seconds"),
)
"""Settings that a running service takes up; the others wait for its next start."""


_EXPECTED = {
    **dict.fromkeys(("path_type", "path_parsing"), "a path"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "tuple_type": "a list of paths",
    "ip_any_address": "an IPv4 or IPv6 address",
}
"""What is expected, in our words, by pydantic's type of error."""


class SettingsError(Exception):
    """Settings that can't be; the message has a line for each, with its name and what was expected."""


def _said(value: Any) -> Any:
    """Refuse what is empty: as a path it would be the working directory, as an address all there are."""
    if value == "":
        raise PydanticCustomError("empty", "something, or that it is left out")
    return value


Address = Annotated[str, BeforeValidator(_said)]
Place = Annotated[Path, BeforeValidator(_said)]


def _hook(value: Any) -> Any:
    """Refuse what can't be called, without telling what it was: it may hold a secret."""
    text = _said(value)
    command = ""
    try:
        if isinstance(text, str) and re.match("[A-Za-z][A-Za-z0-9+.-]*://", text):
            parts = urlsplit(text)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        else:
            command = next(iter(shlex.split(text)), "") if isinstance(text, str) else ""
            sound = bool(command)
    except ValueError:
        sound = False
    if not sound:
        raise PydanticCustomError("hook", "an http:// or https:// URL, or a command as a shell would split it")
    if command and shutil.which(command) is None:
        raise PydanticCustomError("hook", "a command that can be run here, and {command} isn't", {"command": command})
    return text


Hook = Annotated[SecretStr, BeforeValidator(_hook)]


class Settings(BaseModel):
    """All settings, with the names that the command's options have. Port 0 takes a free one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Address = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    http: Annotated[int, Field(ge=0, le=65535, validate_default=True)] = 8080
    certificate: Place | None = None
    """Of this service, in PEM, with those between it and its authority; with its key, TLS is spoken on both ports."""
    key: Place | None = None
    client_ca: Place | None = None
    """Whose certificates cameras and programs must show, in PEM."""
    users: Place | None = None
    """File of people and programs, with their roles. Without one everyone is let in."""
    trusted_proxy: IPvAnyAddress | None = None
    """Of a reverse proxy before the page: its X-Forwarded-For says who asks. Nobody else's is believed."""
    insecure: bool = False
    """Listen beyond loopback also without TLS and authentication."""
    reconstructor: tuple[Place, ...] = ()
    """Files and folders; those that are shipped if there are none."""
    engine: str = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = _CORES
    batch: Annotated[int, Field(ge=1, le=256)] = 16
    """Frames in an engine at once, at most."""
    allow_plain: bool = False
    save: Place | None = None
    record: Place | None = None
    record_hours: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    record_megabytes: Annotated[int, Field(ge=0)] = 0
    record_free: Annotated[int, Field(ge=0)] = 1024
    max_cameras: Annotated[int, Field(ge=1, le=100_000)] = 64
    max_pixels: Annotated[int, Field(ge=256, le=MOST_PIXELS)] = 4096 * 2304
    max_payload: Annotated[int, Field(ge=1024, le=MOST_PAYLOAD)] = 8 << 20
    """Bytes of a frame."""
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 512
    """Calls, and requests of the page, at one time."""
    max_peer_streams: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Calls, and connections of the page, that one certificate's name or one address may have open."""
    max_http: Annotated[int, Field(ge=1, le=1_000_000)] = 384
    """Connections of the page that are open at one time."""
    max_frame_rate: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 240.0
    """Frames a second of a camera; one that sends more is read no faster. 0 sets no limit."""
    max_byte_rate: Annotated[int, Field(ge=0, le=1 << 40)] = 32 << 20
    """Bytes a second of a camera; the same."""
    silent_seconds: Annotated[float, Field(ge=1, le=86_400, allow_inf_nan=False)] = 300.0
    """A camera that publishes nothing for so long is let go."""
    request_seconds: Annotated[float, Field(ge=1, le=600, allow_inf_nan=False)] = 10.0
    """In which a request of the page has to be there as a whole, and a gRPC connection to be made."""
    idle_seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    """A connection on which nothing is asked for so long is ended."""
    on_change: Hook | None = None
    """What is told of each change of a camera's state: an http(s) URL, or a command."""
    log_json: bool = False

    @field_validator("http")
    @classmethod
    def _another_port(cls, http: int, others: ValidationInfo) -> int:
        if http and http == others.data.get("port"):
            raise PydanticCustomError("port", "a port of its own, and that is the gRPC port")
        return http


def read_settings(file: Path | None, given: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from a file, overridden by ``VEILCAM_NAME`` in the environment, overridden by the command line.

    Args:
        file: TOML, or none. Paths in it that aren't absolute begin at its folder, those said elsewhere where one is.
        given: on the command line; None where nothing was.
        environment: what is empty there isn't given.

    Raises:
        SettingsError: a file that can't be read, or whatever isn't a setting or is out of its bounds.
    """
    told: dict[str, tuple[str, Any]] = {}
    if file is not None:
        told |= {name: (f"{file}: {name}", _placed(name, value, file)) for name, value in _read_toml(file).items()}
    for variable, text in environment.items():
        if variable.startswith(PREFIX) and variable != _CONFIG and text:
            name = variable.removeprefix(PREFIX).lower()
            told[name] = (variable, text.split(os.pathsep) if name == "reconstructor" else text)
    told |= {name: (f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None}
    try:
        return Settings.model_validate({name: value for name, (_, value) in told.items()})
    except ValidationError as error:
        raise SettingsError("\n".join(_problem(each, told) for each in error.errors())) from None


def changed(before: Settings, after: Settings) -> list[str]:
    """Names of the settings that differ."""
    return [name for name in Settings.model_fields if getattr(before, name) != getattr(after, name)]


def _placed(name: str, value: Any, file: Path) -> Any:
    """A path that isn't absolute begins at the file it stands in."""
    if name in _PLACES and isinstance(value, str) and value:
        return str(file.parent / value)
    if name == "reconstructor" and isinstance(value, list):
        return [str(file.parent / each) if isinstance(each, str) and each else each for each in value]
    return value


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            return tomllib.load(opened)
    except OSError as error:
        raise SettingsError(f"{file}: can't be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not TOML ({error})") from None


def _problem(error: Any, told: Mapping[str, tuple[str, Any]]) -> str:
    """A line: where it was said, what was said, what was expected."""
    name, *within = (str(part) for part in error["loc"])
    where, _ = told.get(name, (f"{name} (its default)", None))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Settings.model_fields, n=1)
        meant = f"is {near[0]} meant?" if near else f"there are {', '.join(Settings.model_fields)}"
        return f"{where}: no such setting ({meant})"
    expected = _EXPECTED.get(error["type"]) or str(error["msg"]).removeprefix("Input should be ")
    given = error["input"]
    told_input = "what is given" if name == "on_change" and given else repr(given)[:80]
    return f"{'.'.join([where, *within])}: {told_input}, expected {expected}"
