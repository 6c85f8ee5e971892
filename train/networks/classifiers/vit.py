"""A vision transformer (Dosovitskiy et al. 2021) for 32×32."""

from typing import cast

import torch
from torch import Tensor, nn

from train.networks.classifiers.classifier import Classifier, NormedHead, Patches

_WIDTH, _DEPTH, _HEADS, _PLACES = 160, 6, 4, 64


class _Tokens(nn.Module):
    """Patches with their places: (N, 64, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches((32, 64), _WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(1, _PLACES, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.patches(x)) + self.places


def _block() -> nn.Module:
    return nn.TransformerEncoderLayer(
        _WIDTH, _HEADS, 2 * _WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def vit() -> Classifier:
    """A judge: attention in place of convolution."""
    blocks = [_block() for _ in range(_DEPTH)]
    half = _DEPTH // 2
    return Classifier(nn.Sequential(_Tokens(), *blocks[:half]), nn.Sequential(*blocks[half:], NormedHead(_WIDTH)))
