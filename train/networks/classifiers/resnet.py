"""ResNets for 32×32 (He et al. 2015, section 4.2): 6n + 2 layers in three stages of n blocks."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.networks.classifiers.classifier import Classifier, Pooled, conv, conv_bn_relu
from train.networks.classifiers.reversible import Pullback, reversible


class _Block(nn.Module):
    """Two 3×3 layers and the shortcut without weights (option A): every second pixel, zeros for new channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.first_norm(self.first(x)), inplace=True)
        out = self.second_norm(self.second(out))
        return torch.relu_(out + self._shortcut(x))

    def reversible(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """As ``train.networks.classifiers.reversible.Reversible`` has it."""
        deep = nn.Sequential(self.first, self.first_norm, nn.ReLU(), self.second, self.second_norm)
        out, back_through_deep = reversible(deep, x)
        out = functional.relu(out + self._shortcut(x))

        def pullback(gradient: Tensor) -> Tensor:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
            return back_through_deep(gradient) + self._back_through_shortcut(gradient)

        return out, pullback

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.more or self.stride > 1:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return x

    def _back_through_shortcut(self, gradient: Tensor) -> Tensor:
        gradient = gradient[:, : gradient.shape[1] - self.more]
        if self.stride == 1:
            return gradient
        spread = functional.interpolate(gradient, scale_factor=float(self.stride))
        rows, columns = (torch.arange(side) % self.stride == 0 for side in spread.shape[-2:])
        return spread * (rows[:, None] & columns).to(spread)


def _resnet(blocks: int, width: int) -> Classifier:
    channels, stages = width, []
    for stage in range(3):
        outputs = width << stage
        layers = []
        for index in range(blocks):
            layers.append(_Block(channels, outputs, 2 if stage and index == 0 else 1))
            channels = outputs
        stages.append(nn.Sequential(*layers))
    first = nn.Sequential(conv_bn_relu(1, width), stages[0], stages[1])
    return Classifier(first, nn.Sequential(stages[2], Pooled(channels)))


def resnet110() -> Classifier:
    """The paper's: n = 18, 16 channels at first; 1.7 million weights, 0.25 billion multiplications."""
    return _resnet(18, 16)


def resnet14() -> Classifier:
    """A surrogate: n = 2, 32 channels at first."""
    return _resnet(2, 32)
