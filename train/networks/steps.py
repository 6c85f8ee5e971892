"""Steps that a decoder takes along the gradients of readers that it carries, as layers of a network.

x ─▶ readers ─▶ class that they answer ─┐
│                                       ▼
└─▶ + ─▶ readers ─▶ back through their layers ─▶ step away from it ─▶ x, again
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.networks.classifiers.classifier import Classifier
from train.networks.classifiers.reversible import reversible

_TINY = 1e-20
"""Of a mean square: a picture whose gradient is zero stays as it is."""
_REACH = 1.5
"""Steps together are longer than the way may be, so that later ones can still turn it."""


class Steps(nn.Module):
    """Pictures (N, 1, H, W), about [0, 1] → the same, ``size`` away from where they were, by what readers don't read.

    The class to be lost is the one that the readers answer together of the picture as it comes. Each step goes along
    the sum of the readers' gradients of log(1 − p) − log p of that class, of one length each, and the way from the
    picture stays no longer than ``size`` (Kurakin et al. 2017, in the L2 norm).

    Args:
        readers: classifiers of layers that ``reversible`` knows, in evaluation mode, as they stay.
        count: of steps.
    """

    size: Tensor
    """Root mean square of the change, pixels of [0, 1]."""

    def __init__(self, readers: Sequence[Classifier], count: int) -> None:
        super().__init__()
        self.readers = nn.ModuleList(readers)
        self.count = count
        self.register_buffer("size", torch.tensor(0.0))

    def direction(self, pictures: Tensor) -> Tensor:
        """The change that steps within ``size`` end in, of root mean square 1 (or 0 where there is no gradient)."""
        readers = [cast(Classifier, reader) for reader in self.readers]
        together = torch.stack([functional.softmax(reader(pictures).float(), 1) for reader in readers]).sum(0)
        answered = (together == together.amax(1, keepdim=True)).float()
        change = torch.zeros_like(pictures)
        for _ in range(self.count):
            gradients = [_of_length_one(_away(reader, pictures + change, answered)) for reader in readers]
            step = _of_length_one(torch.stack(gradients).sum(0))
            change = change + step * self.size * (_REACH / self.count if self.count > 1 else 1.0)
            change = change / (_length(change) / self.size).clamp_min(1.0)
        return _of_length_one(change)

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures + self.size * self.direction(pictures)


def _away(reader: Classifier, pictures: Tensor, answered: Tensor) -> Tensor:
    middle, back_to_pictures = reversible(reader.first, (pictures - reader.mean) / reader.deviation)
    scores, back_to_middle = reversible(reader.second, middle)
    others = functional.softmax(scores.float().masked_fill(answered > 0, float("-inf")), 1)
    return back_to_pictures(back_to_middle(others - answered)).float()


def _length(change: Tensor) -> Tensor:
    return change.square().mean((1, 2, 3), keepdim=True).clamp_min(_TINY).sqrt()


def _of_length_one(change: Tensor) -> Tensor:
    return change / _length(change)
