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
from train.networks.classifiers.reversible import Pullback, reversible

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

    def forward(self, pictures: Tensor) -> Tensor:
        readers = [cast(Classifier, reader) for reader in self.readers]
        looks = [_look(reader, pictures) for reader in readers]
        together = torch.stack([functional.softmax(scores, 1) for scores, _ in looks]).sum(0)
        answered = together == together.amax(1, keepdim=True)
        change = self._stepped(torch.zeros_like(pictures), looks, answered)
        for _ in range(self.count - 1):
            looks = [_look(reader, pictures + change) for reader in readers]
            change = self._stepped(change, looks, answered)
        return pictures + self.size * _of_length_one(change)

    def _stepped(self, change: Tensor, looks: "Sequence[_Look]", answered: Tensor) -> Tensor:
        gradients = [_of_length_one(back(_away(scores, answered)).float()) for scores, back in looks]
        step = _of_length_one(torch.stack(gradients).sum(0))
        change = change + step * self.size * (_REACH / self.count)
        return change / (_length(change) / self.size).clamp_min(1.0)


_Look = tuple[Tensor, Pullback]
"""What a reader answers, (N, K) logits, and the way back to what it was shown."""


def _look(reader: Classifier, pictures: Tensor) -> _Look:
    middle, back_to_pictures = reversible(reader.first, (pictures - reader.mean) / reader.deviation)
    scores, back_to_middle = reversible(reader.second, middle)
    return scores.float(), lambda gradient: back_to_pictures(back_to_middle(gradient))


def _away(scores: Tensor, answered: Tensor) -> Tensor:
    """The gradient of log(1 − p) − log p of the class that is answered, by the logits."""
    return functional.softmax(scores.masked_fill(answered, float("-inf")), 1) - answered.float()


def _length(change: Tensor) -> Tensor:
    return change.square().mean((1, 2, 3), keepdim=True).clamp_min(_TINY).sqrt()


def _of_length_one(change: Tensor) -> Tensor:
    return change / _length(change)
