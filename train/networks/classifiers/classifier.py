"""What every small classifier is: a normalisation and two halves, so that one can look at it halfway."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from train.networks.classifiers.reversible import Pullback, reversible

CLASSES = 10


class Classifier(nn.Module):
    """Gray pictures (N, 1, H, W) in [0, 1] → logits (N, 10).

    Args:
        first: up to features halfway, (N, C, H', W').
        second: from there to the logits.
        mean: of the pictures that it learns from.
        deviation: of the same.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, first: nn.Module, second: nn.Module, mean: float = 0.5, deviation: float = 0.25) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def middle(self, pictures: Tensor) -> Tensor:
        """Features halfway."""
        return cast(Tensor, self.first((pictures - self.mean) / self.deviation))

    def halfway(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features halfway, and logits."""
        middle = self.middle(pictures)
        return middle, cast(Tensor, self.second(middle))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.halfway(pictures)[1]

    def reversible(self, pictures: Tensor) -> tuple[Tensor, Pullback]:
        """As ``train.networks.classifiers.reversible.Reversible`` has it, where both halves have a way back."""
        middle, back_to_normalised = reversible(self.first, (pictures - self.mean) / self.deviation)
        scores, back_to_middle = reversible(self.second, middle)
        return scores, lambda gradient: back_to_normalised(back_to_middle(gradient)) / self.deviation


class Pooled(nn.Module):
    """Mean over places, then one linear layer: the head of most convolutional classifiers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.linear(features.mean((2, 3)))
        return scores

    def reversible(self, features: Tensor) -> tuple[Tensor, Pullback]:
        """As ``train.networks.classifiers.reversible.Reversible`` has it."""
        height, width = features.shape[-2:]

        def pullback(gradient: Tensor) -> Tensor:
            return (gradient @ self.linear.weight)[:, :, None, None] / (height * width) + torch.zeros_like(features)

        return self(features), pullback


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over channels of (N, C, H, W), each place by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def reversible(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """As ``train.networks.classifiers.reversible.Reversible`` has it."""
        weight, bias = (each.reshape(1, -1, 1, 1) for each in (self.weight, self.bias))
        centred = x - x.mean(1, keepdim=True)
        deviation = torch.sqrt(centred.square().mean(1, keepdim=True) + self.eps)
        normed = centred / deviation

        def pullback(gradient: Tensor) -> Tensor:
            gradient = gradient * weight
            along = (gradient * normed).mean(1, keepdim=True)
            return (gradient - gradient.mean(1, keepdim=True) - normed * along) / deviation

        return normed * weight + bias, pullback


class NormedHead(nn.Module):
    """Mean over places, layer normalisation, one linear layer: the head of classifiers without batch normalisation.

    Args:
        width: of the features.
        places: dimensions to take the mean over, (2, 3) of (N, C, H, W) or (1,) of tokens (N, places, C).
    """

    def __init__(self, width: int, places: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))
        self.places = places

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.layers(features.mean(self.places)))


class Patches(nn.Module):
    """Patches of 4×4 pixels as tokens, (N, 1, 32, 32) → (N, 64, width), by a few small convolutions.

    Convolutional (Xiao et al. 2021) so that they learn fast.

    Args:
        channels: of the 3×3 layers; the last has a stride of 2, as has the 2×2 layer that ends in tokens.
        width: of the tokens.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        layers, before = [], 1
        for place, after in enumerate(channels, 1):
            layers.append(conv_bn_relu(before, after, stride=2 if place == len(channels) else 1))
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, width, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x)).flatten(2).transpose(1, 2)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, or divides it by its stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
