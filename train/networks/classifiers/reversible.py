"""The way back through a classifier's layers, written out: gradients for an engine that has none.

Backward as well as forward is of convolutions, products, comparisons and GELU's own formula, so that ONNX has it too.
"""

from collections.abc import Callable
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.purifiers import windows

Pullback = Callable[[Tensor], Tensor]
"""From the gradient by what a layer gave, to that by what it was given."""


@runtime_checkable
class Reversible(Protocol):
    """A module of ours that can tell its pullback."""

    def reversible(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """What it gives for x in evaluation mode, and the way back."""
        ...


def reversible(layer: nn.Module, x: Tensor) -> tuple[Tensor, Pullback]:
    """What a layer in evaluation mode gives, and the way back through it.

    Sides of x must be multiples of what strides and pools divide them by.

    Raises:
        TypeError: a layer whose way back isn't written here.
    """
    if isinstance(layer, Reversible):
        return layer.reversible(x)
    if isinstance(layer, nn.Sequential):
        pullbacks = []
        for part in layer:
            x, pullback = reversible(part, x)
            pullbacks.append(pullback)
        return x, lambda gradient: _through(reversed(pullbacks), gradient)
    if isinstance(layer, nn.Conv2d):
        return layer(x), lambda gradient: _transposed(layer, gradient)
    if isinstance(layer, nn.BatchNorm2d):
        weight, variance = cast(Tensor, layer.weight), cast(Tensor, layer.running_var)
        scale = (weight / torch.sqrt(variance + layer.eps)).reshape(1, -1, 1, 1)
        return layer(x), lambda gradient: gradient * scale
    if isinstance(layer, nn.ReLU):
        rectified = functional.relu(x)
        return rectified, lambda gradient: torch.ops.aten.threshold_backward(gradient, rectified, 0)
    if isinstance(layer, nn.GELU):
        return layer(x), lambda gradient: torch.ops.aten.gelu_backward(gradient, x, approximate=layer.approximate)
    if isinstance(layer, nn.MaxPool2d):
        return _pooled(layer, x)
    raise TypeError(f"{type(layer).__name__}: the way back through it isn't written")


def _through(pullbacks: "reversed[Pullback]", gradient: Tensor) -> Tensor:
    for pullback in pullbacks:
        gradient = pullback(gradient)
    return gradient


def _transposed(layer: nn.Conv2d, gradient: Tensor) -> Tensor:
    padding = cast(tuple[int, int], layer.padding)
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    if layer.stride == (1, 1) and layer.dilation == (1, 1) and (layer.groups == 1 or depthwise):
        # As a convolution engines are faster, and OpenVINO gives other results for a transposed one of 1×1.
        around = [k - 1 - p for k, p in zip(layer.kernel_size, padding, strict=True)]
        weight = layer.weight if layer.kernel_size == (1, 1) else layer.weight.flip(2, 3)
        weight = weight if depthwise else weight.transpose(0, 1)
        return functional.conv2d(gradient, weight, None, 1, around, 1, layer.groups)
    # A stride leaves out, of an even side and an odd kernel, what the transposed layer must add again.
    rest = [(2 * p - k) % s for k, s, p in zip(layer.kernel_size, layer.stride, padding, strict=True)]
    return functional.conv_transpose2d(gradient, layer.weight, None, layer.stride, padding, rest, layer.groups)


def _pooled(layer: nn.MaxPool2d, x: Tensor) -> tuple[Tensor, Pullback]:
    """Pools side by side, or at every place. Where several are largest each gets the gradient; after a ReLU that is so
    of zeros, which it doesn't pass."""
    largest = layer(x)
    if layer.stride == layer.kernel_size and layer.padding == 0:
        size = float(cast(int, layer.kernel_size))

        def spread(value: Tensor) -> Tensor:
            return functional.interpolate(value, scale_factor=size)

        return largest, lambda gradient: spread(gradient) * (spread(largest) == x)
    kernel = cast(int, layer.kernel_size)
    if layer.stride != 1 or 2 * cast(int, layer.padding) != kernel - 1:
        raise TypeError(f"{layer}: the way back through such a pool isn't written")
    around = functional.pad(x, (kernel // 2,) * 4, value=float("-inf"))
    return largest, lambda gradient: back_to_chosen(gradient, around, largest, kernel)


def back_to_chosen(gradient: Tensor, around: Tensor, chosen: Tensor, kernel: int) -> Tensor:
    """The gradient by x of what was chosen, at every place, among the ``kernel``² values of x around it.

    Args:
        gradient: by what was chosen, (N, C, H, W).
        around: x, and ``kernel`` // 2 more on every side, (N, C, H + …, W + …).
        chosen: (N, C, H, W), each equal to a value around it, or to several; then each gets the gradient.
    """
    total = torch.zeros_like(around)
    for place, value in enumerate(windows(around, kernel)):
        down, right = divmod(place, kernel)
        hit = value == chosen
        total = total + functional.pad(gradient * hit, (right, kernel - 1 - right, down, kernel - 1 - down))
    inner = kernel // 2
    return total[..., inner:-inner, inner:-inner]
