"""Ways from a picture to a reader, as layers that tell their way back (``classifiers.reversible``).

JPEG, blur and median of ``train.purifiers``, unclipped. Pictures are (N, 1, H, W), about [0, 1], sides multiples of 8.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoder.sampling import MID_GREY
from train.networks.classifiers.reversible import Pullback, back_to_chosen
from train.networks.csnet import WHITE
from train.purifiers import dct, gaussian, jpeg_table, windows


class Way(nn.Module):
    """What a picture goes through before a reader sees it."""

    def reversible(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """As ``train.networks.classifiers.reversible.Reversible`` has it."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.reversible(x)[0]


class Jpeg(Way):
    """Baseline JPEG of a quality; back as if rounding kept its error's cube (Shin and Song 2017)."""

    transform: Tensor
    table: Tensor

    def __init__(self, quality: int) -> None:
        super().__init__()
        self.register_buffer("transform", dct(), persistent=False)
        self.register_buffer("table", jpeg_table(quality), persistent=False)

    def reversible(self, x: Tensor) -> tuple[Tensor, Pullback]:
        levels = functional.conv2d(x * WHITE - MID_GREY, self.transform, stride=8) / self.table
        rounded = levels.round()
        kept = 3 * (levels - rounded).square()
        out = functional.conv_transpose2d(rounded * self.table, self.transform, stride=8)

        def pullback(gradient: Tensor) -> Tensor:
            coefficients = functional.conv2d(gradient, self.transform, stride=8)
            return functional.conv_transpose2d(coefficients * kept, self.transform, stride=8)

        return (out + MID_GREY) / WHITE, pullback


class Blur(Way):
    """Gaussian blur, cut off at three sigma; at the edge of what there is of it."""

    kernel: Tensor

    def __init__(self, sigma: float) -> None:
        super().__init__()
        line = gaussian(sigma)
        self._radius = len(line) // 2
        kernel = line[:, None] * line
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None], persistent=False)

    def reversible(self, x: Tensor) -> tuple[Tensor, Pullback]:
        there = self._spread(torch.ones_like(x[:1]))
        return self._spread(x) / there, lambda gradient: self._spread(gradient / there)

    def _spread(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.kernel, padding=self._radius)


class Median(Way):
    """Median of 3×3 pixels, edges repeated; back to the pixel, or all of them, that was the median."""

    def reversible(self, x: Tensor) -> tuple[Tensor, Pullback]:
        around = functional.pad(x, (1,) * 4, mode="replicate")
        chosen = torch.stack(windows(around, 3)).topk(5, dim=0).values[4]
        return chosen, lambda gradient: back_to_chosen(gradient, around, chosen, 3)
