"""A vision transformer (Dosovitskiy et al. 2021) for 32×32: patches of 4×4 from three small convolutions."""

from typing import cast

import torch
from torch import Tensor, nn

from train.networks.classifiers.classifier import CLASSES, Classifier, conv_bn_relu

_WIDTH, _DEPTH, _HEADS, _PLACES = 160, 6, 4, 64


class _Tokens(nn.Module):
    """Patches as tokens with places: (N, 64, width); convolutional (Xiao et al. 2021) to learn fast."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(conv_bn_relu(1, 32), conv_bn_relu(32, 64, stride=2), nn.Conv2d(64, _WIDTH, 2, 2))
        self.places = nn.Parameter(0.02 * torch.randn(1, _PLACES, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.patches(x)).flatten(2).transpose(1, 2) + self.places


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, CLASSES))

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.layers(tokens.mean(1)))


def _block() -> nn.Module:
    return nn.TransformerEncoderLayer(
        _WIDTH, _HEADS, 2 * _WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def vit() -> Classifier:
    """A judge: attention in place of convolution."""
    blocks = [_block() for _ in range(_DEPTH)]
    half = _DEPTH // 2
    return Classifier(nn.Sequential(_Tokens(), *blocks[:half]), nn.Sequential(*blocks[half:], _Head()))
