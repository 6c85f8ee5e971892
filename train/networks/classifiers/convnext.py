"""ConvNeXt (Liu et al. 2022) for 32×32: patches of 2×2, three stages."""

from typing import cast

import torch
from torch import Tensor, nn

from train.networks.classifiers.classifier import ChannelNorm, Classifier, NormedHead

_WIDTHS, _DEPTHS = (48, 96, 192), (2, 3, 2)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + cast(Tensor, out * self.scale).permute(0, 3, 1, 2)


def convnext() -> Classifier:
    """A judge: 7×7 depthwise convolutions, layer normalisation, GELU."""
    stages, before = [], 1
    for width, depth in zip(_WIDTHS, _DEPTHS, strict=True):
        halve = nn.Conv2d(before, width, 2, 2)
        down = [halve, ChannelNorm(width)] if before == 1 else [ChannelNorm(before), halve]
        stages.append(nn.Sequential(*down, *(_Block(width) for _ in range(depth))))
        before = width
    return Classifier(nn.Sequential(*stages[:2]), nn.Sequential(stages[2], NormedHead(before, (2, 3))))
