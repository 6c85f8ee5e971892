"""Small classifiers of further families, quick to train: what a veil learns against when the paper's two are judges."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from train.networks.classifiers.classifier import ChannelNorm, Classifier, NormedHead, Patches, Pooled, conv_bn_relu
from train.networks.classifiers.reversible import Pullback, reversible


def convnet8() -> Classifier:
    """Plain 3×3 layers with max pooling, eight of them."""
    first = nn.Sequential(conv_bn_relu(1, 32), conv_bn_relu(32, 64), nn.MaxPool2d(2), conv_bn_relu(64, 96))
    first.extend([conv_bn_relu(96, 128), nn.MaxPool2d(2)])
    second = nn.Sequential(conv_bn_relu(128, 192), conv_bn_relu(192, 192), nn.MaxPool2d(2), conv_bn_relu(192, 256))
    return Classifier(first, second.append(Pooled(256)))


class _Branches(nn.Module):
    """1×1, 3×3, 5×5 (as two 3×3) and pooling side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        width = outputs // 4
        self.one = conv_bn_relu(inputs, width, 1)
        self.three = nn.Sequential(conv_bn_relu(inputs, width, 1), conv_bn_relu(width, width))
        self.five = nn.Sequential(
            conv_bn_relu(inputs, width, 1), conv_bn_relu(width, width), conv_bn_relu(width, width)
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn_relu(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self._branches()], 1)

    def reversible(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """As ``train.networks.classifiers.reversible.Reversible`` has it."""
        outs, pullbacks = zip(*(reversible(branch, x) for branch in self._branches()), strict=True)
        widths = [out.shape[1] for out in outs]

        def pullback(gradient: Tensor) -> Tensor:
            parts = [back(part) for back, part in zip(pullbacks, torch.split(gradient, widths, 1), strict=True)]
            return torch.stack(parts).sum(0)

        return torch.cat(outs, 1), pullback

    def _branches(self) -> tuple[nn.Module, ...]:
        return self.one, self.three, self.five, self.pool


def inception() -> Classifier:
    """Branches of several sizes (Szegedy et al. 2015)."""
    first = nn.Sequential(conv_bn_relu(1, 48), nn.MaxPool2d(2), _Branches(48, 128), _Branches(128, 128))
    second = nn.Sequential(nn.MaxPool2d(2), _Branches(128, 192), _Branches(192, 256), Pooled(256))
    return Classifier(first, second)


class _Mixed(nn.Module):
    """Two small perceptrons with shortcuts: one across places, one across channels."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.before_places, self.before_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.places = nn.Sequential(nn.Linear(places, places), nn.GELU(), nn.Linear(places, places))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + cast(Tensor, self.places(self.before_places(x).transpose(1, 2))).transpose(1, 2)
        return x + cast(Tensor, self.channels(self.before_channels(x)))


def mixer() -> Classifier:
    """Patches and perceptrons, neither convolution nor attention (Tolstikhin et al. 2021)."""
    width, places = 160, 64
    first = nn.Sequential(Patches((64,), width), *(_Mixed(places, width) for _ in range(3)))
    return Classifier(first, nn.Sequential(*(_Mixed(places, width) for _ in range(3)), NormedHead(width)))


class _Spread(nn.Module):
    """A 5×5 layer within each channel beside a shortcut, then a 1×1 layer across channels."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.within = nn.Sequential(nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GELU(), norm(width))
        self.across = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.across(x + self.within(x)))

    def reversible(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """As ``train.networks.classifiers.reversible.Reversible`` has it."""
        out, back_through_within = reversible(self.within, x)
        out, back_through_across = reversible(self.across, x + out)

        def pullback(gradient: Tensor) -> Tensor:
            gradient = back_through_across(gradient)
            return gradient + back_through_within(gradient)

        return out, pullback


def _convmixer(norm: Callable[[int], nn.Module]) -> Classifier:
    width = 128
    patches = nn.Sequential(nn.Conv2d(1, width, 2, 2), nn.GELU(), norm(width))
    first = nn.Sequential(patches, *(_Spread(width, norm) for _ in range(3)))
    return Classifier(first, nn.Sequential(*(_Spread(width, norm) for _ in range(3)), Pooled(width)))


def convmixer() -> Classifier:
    """Patches of 2×2, then depthwise and 1×1 convolutions at one size throughout (Trockman and Kolter 2022)."""
    return _convmixer(nn.BatchNorm2d)


def convmixer_ln() -> Classifier:
    """A convmixer that normalises each place by itself, where the other goes by what a batch was like."""
    return _convmixer(ChannelNorm)
