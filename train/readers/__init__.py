"""Classifiers that read pictures: surrogates, which a veil is trained against, and judges, which only measure it.

Their weights are no part of this project: each is loaded from an installed package or from a folder that the user
names, and a reader whose weights aren't there says where they come from. All read gray pictures (N, 1, H, W) in
[0, 1] of any size and answer with the 1,000 classes of ImageNet.
"""

from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

SURROGATES = {
    "efficientnet_lite0": "train.readers.efficientnet_lite:lite0",
    "mobilenet_v2": "train.readers.mobilenet_v2:mobilenet_v2",
}
"""May be trained against: differentiable."""
JUDGES = {
    "efficientnet_lite1": "train.readers.efficientnet_lite:lite1",
    "mobilenet_v2_quantised": "train.readers.tflite:mobilenet_v2_quantised",
    "mobilenet_v1_quantised": "train.readers.tflite:mobilenet_v1_quantised",
}
"""Never trained against."""


class ReaderError(Exception):
    """A reader whose weights or package aren't there; the message says how to get them."""


class Reader(Protocol):
    """A classifier with its own way of looking: scores (N, 1000), the larger the likelier."""

    def __call__(self, pictures: Tensor) -> Tensor: ...


class Surrogate(Reader, Protocol):
    """A reader that can be trained against."""

    @property
    def middle(self) -> nn.Module:
        """The layer halfway, whose output stands for what a reader sees before it decides."""
        ...


def read(surrogate: Surrogate, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """A surrogate's output halfway (N, …), and its scores (N, 1000)."""
    kept: list[Tensor] = []
    hook = surrogate.middle.register_forward_hook(lambda layer, given, output: kept.append(output))
    try:
        scores = surrogate(pictures)
    finally:
        hook.remove()
    return kept[0], scores


def open_reader(name: str, folder: Path | None = None) -> Reader:
    """Load a reader.

    Args:
        folder: where weights lie that no package has.

    Raises:
        ReaderError: unknown name, or its package or weights aren't there.
    """
    known = SURROGATES | JUDGES
    if name not in known:
        raise ReaderError(f"reader {name!r}: expected one of {', '.join(known)}")
    module, attribute = known[name].split(":")
    try:
        reader: Reader = getattr(import_module(module), attribute)(folder)
    except ImportError as error:
        hint = import_module(module).INSTALL if error.name and not error.name.startswith("train") else ""
        raise ReaderError(f"reader {name}: {error.name} is missing; {hint}") from None
    return reader


def looked_at(pictures: Tensor, side: int) -> Tensor:
    """The middle square of pictures as a reader looks at it: (N, 3, side, side), three equal channels, in [0, 1]."""
    height, width = pictures.shape[-2:]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    middle = pictures[..., top : top + square, left : left + square]
    if square != side:
        middle = functional.interpolate(middle, (side, side), mode="bilinear", antialias=True)
    return middle.expand(-1, 3, -1, -1)
