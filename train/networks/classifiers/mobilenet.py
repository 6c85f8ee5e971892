"""MobileNetV2 (Sandler et al. 2018) for 32×32: strides taken out of the first layers, half the width."""

from torch import Tensor, nn

from train.networks.classifiers.classifier import Classifier, Pooled, conv, conv_bn_relu

_STAGES = ((1, 16, 1, 1), (6, 16, 2, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 48, 2, 1), (6, 80, 2, 2))
"""Expansion, channels, repeats, stride."""
_HALFWAY = 4


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.widen = conv_bn_relu(inputs, inner, 1) if expansion > 1 else nn.Identity()
        self.deep = nn.Sequential(
            conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)
        )
        self.narrow = nn.Sequential(conv(inner, outputs, 1), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.deep(self.widen(x)))
        return x + out if self.residual else out


def mobilenet_v2() -> Classifier:
    """A judge: depthwise convolutions, 0.3 million weights."""
    channels, stages = 16, [conv_bn_relu(1, 16)]
    for expansion, outputs, repeats, stride in _STAGES:
        layers = []
        for index in range(repeats):
            layers.append(_Inverted(channels, outputs, stride if index == 0 else 1, expansion))
            channels = outputs
        stages.append(nn.Sequential(*layers))
    last = nn.Sequential(conv_bn_relu(channels, 320, 1), Pooled(320))
    return Classifier(nn.Sequential(*stages[:_HALFWAY]), nn.Sequential(*stages[_HALFWAY:], last))
