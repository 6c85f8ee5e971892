"""Run files: one short TOML file per trained model, checked as a whole before anything starts."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from train.networks.classifiers import CLASSIFIERS
from train.networks.quarter import SCALE
from train.networks.steps import WAYS

MODEL = "model"
"""What a run may need: any finished S and G."""
Settings = TypeVar("Settings", "Run", "Measurement")


class SettingsError(ValueError):
    """A run file that can't be used; the message names the file, the key and what was expected."""


def bounded(default: Any, low: float, high: float) -> Any:
    """A dataclass field that must lie in [low, high]."""
    return field(default=default, metadata={"bounds": (low, high)})


def chosen(*names: str) -> Any:
    """A dataclass field that must be one of some names; the first is its default."""
    return field(default=names[0], metadata={"choices": names})


def several(kind: type, *default: Any, among: Iterable[str] = ()) -> Any:
    """A dataclass field that is a list of one type; or of some names, one at least."""
    return field(default=default, metadata={"each": kind, "among": tuple(among)})


@dataclass(frozen=True)
class Run:
    """What every run has."""

    kind: ClassVar[str] = ""
    gives_pictures: ClassVar[bool] = False
    """It ends in an S and G of small pictures."""
    veils: ClassVar[bool] = False
    """Its pictures are to mislead readers."""
    formerly: ClassVar[Mapping[str, Any]] = {}
    """What a checkpoint did that is older than a setting, where that isn't the setting's default."""
    iterations: int = bounded(1000, 1, 10_000_000)
    batch: int = bounded(16, 1, 4096)
    learning_rate: float = bounded(1e-3, 1e-7, 1.0)
    seed: int = bounded(1, 0, 2**31)

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        """Runs that must have finished, and what each must be: a kind of run, or any ``MODEL``."""
        return ()

    def problem(self) -> str:
        """What is wrong with settings that are right one by one; nothing if nothing is."""
        return ""


@dataclass(frozen=True)
class PlainRun(Run):
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
    """A finished plain run whose rows of Φ come first and stay as they are, all of them where this run has no more; its
    deep layers start this run's where they are as many and as wide."""

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        return ((self.extends, PlainRun.kind),) if self.extends else ()

    def problem(self) -> str:
        if self.block % SCALE:
            return f"block = {self.block}, expected a multiple of {SCALE}"
        return f"crop = {self.crop}, expected a multiple of block, {self.block}" if self.crop % self.block else ""


@dataclass(frozen=True)
class VeilRun(Run):
    """A veiled G for the Φ of a finished plain run."""

    kind: ClassVar[str] = "veil"
    veils: ClassVar[bool] = True
    extends: str = ""
    """The finished plain run that G and Φ come from; Φ stays as it is."""
    readers: tuple[str, ...] = several(str, "efficientnet_lite0", "mobilenet_v2")
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

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        return ((self.extends, PlainRun.kind),)

    def problem(self) -> str:
        return "" if self.readers else "readers: none, expected at least one"


@dataclass(frozen=True)
class SmallRun(Run):
    """What runs on a small labelled set have."""

    data: str = chosen("cifar10", "mnist")
    batch: int = bounded(250, 2, 4096)

    @property
    def against(self) -> tuple[str, ...]:
        """What a veil was trained against."""
        return ()


@dataclass(frozen=True)
class ClassifierRun(SmallRun):
    """A classifier of small gray pictures; learning rate by warm-up and cosine."""

    kind: ClassVar[str] = "classifier"
    network: str = chosen(*CLASSIFIERS)
    iterations: int = bounded(3200, 1, 10_000_000)
    warm_up: int = bounded(400, 0, 100_000)
    batch: int = bounded(125, 1, 4096)
    optimiser: str = chosen("sgd", "adamw")
    """SGD with Nesterov momentum 0.9, or AdamW."""
    learning_rate: float = bounded(0.1, 1e-7, 1.0)
    weight_decay: float = bounded(5e-4, 0.0, 1.0)


@dataclass(frozen=True)
class SteppedRun(SmallRun):
    """A run whose learning rate falls as the paper's does."""

    drops: tuple[int, ...] = several(int)
    """Iterations from which the learning rate is a tenth of what it was."""


@dataclass(frozen=True)
class CSNetRun(SteppedRun):
    """The paper's S and G by mean squared error (5)."""

    kind: ClassVar[str] = "csnet"
    gives_pictures: ClassVar[bool] = True
    ratio: float = bounded(0.1, 0.001, 1.0)
    start: str = chosen("random", "principal")
    """Where Φ and the initial reconstruction start: random as in the paper, or the principal directions of blocks."""


@dataclass(frozen=True)
class RefinedRun(SmallRun):
    """A CSNet as it is, whose pictures are refined (``train.networks.refinement``) by mean squared error (5)."""

    kind: ClassVar[str] = "refined"
    gives_pictures: ClassVar[bool] = True
    extends: str = ""
    """The finished CSNet."""
    batch: int = bounded(125, 2, 4096)
    warm_up: int = bounded(50, 0, 100_000)

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        return ((self.extends, CSNetRun.kind),)


@dataclass(frozen=True)
class AdversarialRun(SteppedRun):
    """Adv-CSNet-C: the G of a CSNet against one frozen classifier, (4) and (6)."""

    kind: ClassVar[str] = "adversarial"
    veils: ClassVar[bool] = True
    gives_pictures: ClassVar[bool] = True
    extends: str = ""
    """The finished CSNet that S, which stays as it is, and G come from."""
    classifier: str = ""
    """The finished classifier run that G is trained against."""
    alpha: float = bounded(1.0, 0.0, 1e6)
    beta: float = bounded(1.0, 0.0, 1e6)
    beta_later: float = bounded(1.0, 0.0, 1e6)
    """β once the classifier reads less than ``read_below`` of the training pictures; MNIST: 0.1."""
    read_below: float = bounded(0.0, 0.0, 1.0)
    read_over: float = bounded(1.0, 0.01, 100.0)
    """Passes through the training pictures after which what was read of them is looked at; the paper doesn't say."""
    answers: str = chosen("logits", "softmax")
    """What the cross-entropy of L_C, which has a softmax of its own, is given: the classifier's logits; or, as where a
    network ends in a softmax already, their softmax. Then L_C can't exceed log(e + K − 1), 2.46 for ten classes."""

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        return (self.extends, CSNetRun.kind), (self.classifier, ClassifierRun.kind)

    @property
    def against(self) -> tuple[str, ...]:
        return (self.classifier,)


@dataclass(frozen=True)
class GenerativeRun(SteppedRun):
    """Adv-CSNet: the G of a CSNet against a discriminator that learns beside it, (7) to (12)."""

    kind: ClassVar[str] = "generative"
    veils: ClassVar[bool] = True
    gives_pictures: ClassVar[bool] = True
    extends: str = ""
    alpha: float = bounded(1.0, 0.0, 1e6)
    lambda_d: float = bounded(1.0, 0.0, 1e6)
    """D_rf and D_rec take turns, each by an Adam of its own, which takes no notice of a constant factor: of this and of
    γ_D it only matters whether they are 0."""
    gamma_d: float = bounded(0.0, 0.0, 1e6)
    """As printed 0: D_rec's own layer stays as it was drawn, on a trunk that learns for D_rf. With 1 it learns."""
    lambda_g: float = bounded(1.0, 0.0, 1e6)
    gamma_g: float = bounded(0.1, 0.0, 1e6)

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        return ((self.extends, CSNetRun.kind),)

    @property
    def against(self) -> tuple[str, ...]:
        return ("discriminator",)


@dataclass(frozen=True)
class SurrogatesRun(SmallRun):
    """What veils a CSNet against several readers."""

    veils: ClassVar[bool] = True
    extends: str = ""
    """The finished CSNet that S, which stays as it is, and G come from."""
    surrogates: tuple[str, ...] = several(str)
    """Finished classifier runs that the veil is made against."""

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        return (self.extends, CSNetRun.kind), *((name, ClassifierRun.kind) for name in self.surrogates)

    @property
    def against(self) -> tuple[str, ...]:
        return self.surrogates

    def problem(self) -> str:
        return "" if self.surrogates else "surrogates: none, expected at least one finished classifier run"


@dataclass(frozen=True)
class EnsembleRun(SurrogatesRun):
    """Adv-CSNet-E: the G of a CSNet against several readers, through purifiers or not, at a given cost in PSNR."""

    kind: ClassVar[str] = "ensemble"
    gives_pictures: ClassVar[bool] = True
    formerly: ClassVar[Mapping[str, Any]] = {"by_need": False, "moved": False}
    at_once: int = bounded(3, 1, 64)
    """Readers that look at a batch, drawn anew for each."""
    target: str = chosen("softmax", "unreadable", "uniform", "ascent")
    """What a surrogate's answer should become: another class, by the cross-entropy of its softmax, which is bounded and
    spends nothing on pictures that are beyond reach; not the label, −log(1 − p); equally likely for all classes; or, as
    in (4), whatever makes the label's cross-entropy large."""
    fidelity: str = chosen("error", "psnr")
    """What is held against the answers: the squared error of (5); or each picture's error by its logarithm, as PSNR
    counts it (below zero in logs), so that more of the veil lies in pictures where the reconstruction errs already."""
    beta: float = bounded(1.0, 0.0, 1e6)
    """Weight of the surrogates' answers."""
    likeness: float = bounded(1.0, 0.0, 1e6)
    """Weight of surrogates' likeness halfway, ``train.objectives.veil.likeness``."""
    by_need: bool = True
    """Readers that look at a batch together count by what they still read above chance, else evenly."""
    moved: bool = True
    """Pictures are moved by up to two pixels, and half of them mirrored, on their way to readers, which learn from such
    in any case. What fools one of them wherever it falls fools others too (input diversity, Xie et al. 2019)."""
    purified: bool = True
    """Half of the pictures pass a random purifier on their way to the surrogates."""
    learning_readers: int = bounded(0, 0, 8)
    """Readers that learn on the veiled pictures, with their labels, beside G. Every ``restart`` iterations the next of
    them starts anew, from the next surrogate."""
    restart: int = bounded(200, 1, 1_000_000)
    kept_readers: int = bounded(1, 0, 8)
    """Of the readers that started anew, the last ones are kept as they were, and G is trained against them too."""
    psnr_lost: float = bounded(0.0095, 1e-4, 0.5)
    """Share of the CSNet's PSNR that the veil may cost; the weight of the reconstruction follows it, and in the end the
    veil is made just so strong, or left where it costs least near what was learned."""
    psnr_lost_at_first: float = bounded(0.05, 0.0, 0.5)
    """Where that share begins: a veil is found sooner where it may cost more."""
    price_falls: float = bounded(0.5, 0.01, 1.0)
    """Part of the run over which that share falls evenly to ``psnr_lost``."""
    weight_moves: float = bounded(0.05, 1e-4, 1.0)
    """By how much the weight of the reconstruction moves in an iteration, at most, as a part of itself. Where the price
    falls while G still learns fast, a weight that moves fast grows so far that the veil is lost."""
    warm_up: int = bounded(50, 0, 100_000)
    learning_rate: float = bounded(5e-4, 1e-7, 1.0)


@dataclass(frozen=True)
class StepsRun(SurrogatesRun):
    """Adv-CSNet-S: a CSNet as it is, refined or not, and steps of its decoder along gradients of surrogates in it.

    Of these and of the guide the way back must be written (``train.networks.classifiers.reversible``): convmixer,
    convmixer_ln, convnet8, inception, resnet14, resnet110 and vgg16.
    """

    kind: ClassVar[str] = "steps"
    gives_pictures: ClassVar[bool] = True
    refined: str = ""
    """The finished refined run of that CSNet whose pictures the steps start from; if none is named, the CSNet's own."""
    guide: str = ""
    """The finished retrained run, of the pictures that steps start from, that says what one may be; carried too."""
    steps: int = bounded(6, 1, 64)
    through: tuple[str, ...] = several(str, "as is", "jpeg", "blur", "median", "jpeg", among=WAYS)
    """What the surrogates look through, in turn from step to step (``train.networks.steps.WAYS``); JPEG twice, as it
    takes away most."""
    psnr_lost: float = bounded(0.0095, 1e-4, 0.5)
    """Share of the CSNet's PSNR that may be lost in the end, which says how far the steps go."""
    iterations: int = bounded(40, 1, 10_000_000)
    """Batches of training pictures that the size is found on."""
    batch: int = bounded(50, 2, 4096)
    learning_rate: float = bounded(1.0, 1e-7, 1.0)
    """Of the size's logarithm, divided by the iteration: 1 is the mean of what batches tell."""

    @property
    def start(self) -> str:
        """The model whose pictures the steps start from."""
        return self.refined or self.extends

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        refined = ((self.refined, RefinedRun.kind),) if self.refined else ()
        return *super().needs, *refined, (self.guide, RetrainedRun.kind)


@dataclass(frozen=True)
class RetrainedRun(SmallRun):
    """A reader that learns to read a model's pictures from labelled ones (tier T4)."""

    kind: ClassVar[str] = "retrained"
    reader: str = ""
    """The finished classifier run that is retrained."""
    model: str = ""
    """The finished model whose pictures it learns from."""
    scratch: bool = False
    """Start from new weights instead of the reader's."""
    iterations: int = bounded(1200, 1, 10_000_000)
    """At most; it ends before when accuracy stops rising. After two thirds the learning rate is lower in any case."""
    batch: int = bounded(125, 1, 4096)
    learning_rate: float = bounded(0.01, 1e-7, 1.0)
    check_every: int = bounded(200, 1, 1_000_000)
    patience: int = bounded(2, 1, 1000)
    """Checks without a rise after which the learning rate drops, and then the run ends."""
    warm_up: int = bounded(0, 0, 100_000)

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        return (self.reader, ClassifierRun.kind), (self.model, MODEL)


@dataclass(frozen=True)
class Measurement:
    """How the models of a schedule are measured; names of models may have wildcards."""

    kind: ClassVar[str] = "measurement"
    purified: tuple[str, ...] = several(str, "*")
    """Models whose pictures are also measured beside controls and through purifiers."""
    retrained: tuple[str, ...] = several(str)
    """Models that readers are retrained on (tier T4)."""
    readers: tuple[str, ...] = several(str, "vgg16", "resnet110")
    """Classifier runs that are retrained."""
    scratch: bool = False
    """Retrain from new weights as well as from the readers' own."""
    retrained_iterations: int = bounded(1200, 1, 10_000_000)


KINDS: dict[str, type[Run]] = {
    run.kind: run
    for run in (
        PlainRun,
        VeilRun,
        ClassifierRun,
        CSNetRun,
        RefinedRun,
        AdversarialRun,
        GenerativeRun,
        EnsembleRun,
        StepsRun,
        RetrainedRun,
    )
}


MODEL_KINDS = tuple(kind for kind, run in KINDS.items() if run.gives_pictures)


def read_run(path: Path) -> Run:
    """Read and check a run file.

    Raises:
        SettingsError: unreadable, an unknown or missing key, a value of the wrong type or out of bounds.
    """
    return _read(path, "run", KINDS)


def read_measurement(path: Path) -> Measurement:
    """Read and check a schedule's file about measuring, in the same way."""
    return _read(path, "measurement", {Measurement.kind: Measurement})


def _read(path: Path, what: str, kinds: Mapping[str, type[Settings]]) -> Settings:
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such {what} file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: not a {what} file ({error})") from None
    kind = table.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise SettingsError(f"{path}: kind = {kind!r}, expected one of {', '.join(kinds)}")
    known = {f.name: f for f in fields(kinds[kind])}
    for key, value in table.items():
        if key not in known:
            raise SettingsError(f"{path}: unknown key {key!r}, a {kind} {what} has {', '.join(known)}")
        table[key] = _checked(path, known[key], value)
    read = kinds[kind](**table)
    if isinstance(read, Run) and (problem := read.problem()):
        raise SettingsError(f"{path}: {problem}")
    return read


def _checked(path: Path, spec: "Field[Any]", value: Any) -> Any:
    each = spec.metadata.get("each")
    if each is not None:
        if not isinstance(value, list) or any(type(v) is not each for v in value):
            raise SettingsError(f"{path}: {spec.name} = {value!r}, expected a list of {each.__name__}")
        among = spec.metadata["among"]
        if among and (not value or not set(value) <= set(among)):
            raise SettingsError(f"{path}: {spec.name} = {value!r}, expected a list of {', '.join(map(repr, among))}")
        return tuple(value)
    if isinstance(spec.default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(spec.default):
        raise SettingsError(f"{path}: {spec.name} = {value!r}, expected {type(spec.default).__name__}")
    low, high = spec.metadata.get("bounds", (None, None))
    if low is not None and not low <= value <= high:
        raise SettingsError(f"{path}: {spec.name} = {value}, expected {low} to {high}")
    choices = spec.metadata.get("choices", (value,))
    if value not in choices:
        raise SettingsError(f"{path}: {spec.name} = {value!r}, expected one of {', '.join(choices)}")
    return value
