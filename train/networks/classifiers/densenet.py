"""DenseNet-BC (Huang et al. 2017) for 32×32, small."""

import torch
from torch import Tensor, nn

from train.networks.classifiers.classifier import Classifier, Pooled, conv

_GROWTH, _LAYERS = 12, 5


class _Layer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        inner = 4 * _GROWTH
        self.layers = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, inner, 1),
            nn.BatchNorm2d(inner), nn.ReLU(inplace=True), conv(inner, _GROWTH),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def _block(channels: int) -> nn.Sequential:
    return nn.Sequential(*(_Layer(channels + _GROWTH * k) for k in range(_LAYERS)))


def _transition(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, outputs, 1), nn.AvgPool2d(2))


def densenet() -> Classifier:
    """A judge: 3 dense blocks of 5 layers, growth 12, half compression."""
    channels, stages = 2 * _GROWTH, [nn.Sequential(conv(1, 2 * _GROWTH, 3))]
    for _ in range(2):
        dense = channels + _GROWTH * _LAYERS
        stages.append(nn.Sequential(_block(channels), _transition(dense, dense // 2)))
        channels = dense // 2
    dense = channels + _GROWTH * _LAYERS
    end = nn.Sequential(nn.BatchNorm2d(dense), nn.ReLU(inplace=True), Pooled(dense))
    return Classifier(nn.Sequential(*stages), nn.Sequential(_block(channels), end))
