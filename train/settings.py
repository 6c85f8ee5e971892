"""Run files: one short TOML file per trained model, checked as a whole before anything starts."""

import tomllib
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar


class SettingsError(ValueError):
    """A run file that can't be used; the message names the file, the key and what was expected."""


def bounded(default: Any, low: float, high: float) -> Any:
    """A dataclass field that must lie in [low, high]."""
    return field(default=default, metadata={"bounds": (low, high)})


@dataclass(frozen=True)
class PlainRun:
    """A plain S and G by mean squared error. 16 × 96² pixels an iteration: 38 passes over BSDS500 train + test."""

    kind: ClassVar[str] = "plain"
    ratio: float = bounded(0.1, 0.004, 1.0)
    block: int = bounded(16, 4, 64)
    residual_blocks: int = bounded(5, 1, 32)
    channels: int = bounded(64, 8, 512)
    iterations: int = bounded(16000, 1, 10_000_000)
    warm_up: int = bounded(200, 0, 100_000)
    batch: int = bounded(16, 1, 4096)
    crop: int = bounded(96, 16, 4096)
    learning_rate: float = bounded(6e-4, 1e-7, 1.0)
    average: float = bounded(0.999, 0.0, 0.99999)
    """Decay of the moving average of weights that is kept as the result."""
    extends: str = ""
    """A finished plain run whose rows of Φ come first and stay as they are, and whose deep layers start this one."""
    seed: int = bounded(1, 0, 2**31)


@dataclass(frozen=True)
class VeilRun:
    """A veiled G for the Φ of a finished plain run."""

    kind: ClassVar[str] = "veil"
    extends: str = ""
    """The finished plain run that G and Φ come from; Φ stays as it is."""
    readers: tuple[str, ...] = ("efficientnet_lite0", "mobilenet_v2")
    iterations: int = bounded(1200, 1, 10_000_000)
    warm_up: int = bounded(50, 0, 100_000)
    batch: int = bounded(8, 1, 4096)
    """Pictures an iteration, of the smallest that are looked at; fewer of larger ones."""
    learning_rate: float = bounded(3e-4, 1e-7, 1.0)
    average: float = bounded(0.99, 0.0, 0.99999)
    alpha: float = bounded(100.0, 0.0, 1e6)
    """Weight of the reconstruction error, α of equation (4)."""
    beta: float = bounded(0.15, 0.0, 1e6)
    """Weight of what the readers read, β of equation (4)."""
    gamma: float = bounded(0.0, 0.0, 1e6)
    """Weight of readers' likeness halfway, train.objectives.veil.likeness."""
    visibility: float = bounded(0.0, 0.0, 1e6)
    """Weight of change where eyes see it, train.objectives.veil.visibility."""
    repetition: float = bounded(0.0, 0.0, 1e6)
    """Weight of change that repeats with blocks or deep features, train.objectives.veil.repetition."""
    seed: int = bounded(1, 0, 2**31)


KINDS: dict[str, type[PlainRun] | type[VeilRun]] = {run.kind: run for run in (PlainRun, VeilRun)}


def read_run(path: Path) -> PlainRun | VeilRun:
    """Read and check a run file.

    Raises:
        SettingsError: unreadable, an unknown or missing key, a value of the wrong type or out of bounds.
    """
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: not a run file ({error})") from None
    kind = table.pop("kind", None)
    if kind not in KINDS:
        raise SettingsError(f"{path}: kind = {kind!r}, expected one of {', '.join(KINDS)}")
    known = {f.name: f for f in fields(KINDS[kind])}
    for key, value in table.items():
        if key not in known:
            raise SettingsError(f"{path}: unknown key {key!r}, a {kind} run has {', '.join(known)}")
        table[key] = _checked(path, known[key], value)
    return KINDS[kind](**table)


def _checked(path: Path, spec: "Field[Any]", value: Any) -> Any:
    default = spec.default if spec.default is not MISSING else None
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(default, tuple) and isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = tuple(value)
    if type(value) is not type(default):
        raise SettingsError(f"{path}: {spec.name} = {value!r}, expected {type(default).__name__}")
    low, high = spec.metadata.get("bounds", (None, None))
    if low is not None and not low <= value <= high:
        raise SettingsError(f"{path}: {spec.name} = {value}, expected {low} to {high}")
    return value
