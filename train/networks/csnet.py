"""CSNet (Shi et al. 2017) as the paper has it: sampling by blocks of 32, initial and residual deep reconstruction.

    x ─▶ S: 32×32, stride 32 ─▶ s ─▶ 1×1 → B² ─▶ shuffle B ─┬──────────────────────────────────▶ + ─▶ x'
                                                            └─▶ 3×3 → 64 ─▶ 3×3 … ─▶ 3×3 → 1 ─▶ ┘

About 110 thousand multiplications a pixel; ``train.networks.quarter`` is the one for cameras.
"""

import copy
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoder.sampling import MID_GREY
from train.networks.refinement import Refinement, rows_sent

BLOCK = 32
CHANNELS = 64
WHITE = 255.0
_INNER_LAYERS = 3


def floor_rows(ratio: float, block: int = BLOCK) -> int:
    """Rows m = ⌊r·B²⌋, as the paper counts: 102, 204 and 307 of 1,024 at r = 0.1, 0.2 and 0.3."""
    return math.floor(ratio * block**2 + 1e-9)


class Reconstruction(nn.Module):
    """G: measurements (N, m, H/B, W/B) → pictures (N, 1, H, W), about [0, 1], not clipped."""

    def __init__(self, rows: int, block: int = BLOCK, channels: int = CHANNELS) -> None:
        super().__init__()
        self.block = block
        self.initial = nn.Conv2d(rows, block**2, 1, bias=False)
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(_INNER_LAYERS):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
        self.deep = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, measurements: Tensor) -> Tensor:
        initial = functional.pixel_shuffle(self.initial(measurements), self.block)
        return initial + cast(Tensor, self.deep(initial))


class WireReconstruction(nn.Module):
    """The same G for measurements as they come off the wire: levels (N, m, H/B, W/B) of a quantiser → pictures.

    A camera samples ``y = P (255·x − 128)`` with rows P of unit length, most energetic first, and sends ``y / step``.
    P spans what S spans, so that G needs another first layer and nothing else: with Φ = A·P,
    ``Φ x = A (y + 128·P·1) / 255``. A refinement has P for its basis, and agrees with the rows that were sent.

    Args:
        net: a trained S and G.
        rows: P, float64 (m, B²), orthonormal, of the same span as Φ.
        steps: float32 (m,), on the 0..255 pixel scale.
    """

    steps: Tensor
    mid_grey: Tensor
    """What P measures of it."""
    refinement: Refinement | None

    def __init__(self, net: "CSNet", rows: Tensor, steps: Tensor) -> None:
        super().__init__()
        area = rows.shape[1]
        self.block = net.reconstruction.block
        phi = net.sampling.weight.detach().double().reshape(-1, area)
        weight = net.reconstruction.initial.weight.detach().double().reshape(area, -1) @ (phi @ rows.T)
        self.initial = nn.Conv2d(len(rows), area, 1)
        self.deep, self.refinement, self.after = net.reconstruction.deep, None, net.after
        self.register_buffer("steps", steps.reshape(1, -1, 1, 1))
        mid_grey = MID_GREY * rows.sum(1)
        if net.refinement is not None:
            self.refinement = copy.deepcopy(net.refinement)
            self.refinement.rows.copy_(rows.reshape_as(self.refinement.rows))
            self.register_buffer("mid_grey", mid_grey.float().reshape(1, -1, 1, 1))
        with torch.no_grad():
            self.initial.weight.copy_((weight / WHITE).reshape(area, -1, 1, 1))
            assert self.initial.bias is not None
            self.initial.bias.copy_(weight @ mid_grey / WHITE)

    def forward(self, levels: Tensor) -> Tensor:
        measured = levels * self.steps
        initial = functional.pixel_shuffle(self.initial(measured), self.block)
        pictures = initial + self.deep(initial)
        if self.refinement is not None:
            pictures = self.refinement(pictures, (measured + self.mid_grey) / WHITE, rows_sent(levels))
        return cast(Tensor, self.after(pictures))


class CSNet(nn.Module):
    """S and G: pictures (N, 1, H, W) in [0, 1], H and W multiples of B → reconstructions of the same shape.

    ``after`` is what a decoder does to G's pictures: nothing, or ``train.networks.steps.Steps``. Before that they may
    be refined. What was measured, by the refinement's basis, is then what it measures of the picture itself.
    """

    refinement: Refinement | None

    def __init__(self, rows: int, block: int = BLOCK, channels: int = CHANNELS) -> None:
        super().__init__()
        self.sampling = nn.Conv2d(1, rows, block, block, bias=False)
        self.reconstruction = Reconstruction(rows, block, channels)
        self.refinement = None
        self.after: nn.Module = nn.Identity()

    def span(self) -> Tensor:
        """An orthonormal basis of what S measures: float64 (m, B²)."""
        phi = self.sampling.weight.detach().double().flatten(1)
        return cast(Tensor, torch.linalg.qr(phi.T).Q.T)

    @torch.no_grad()
    def start_from(self, phi: Tensor) -> None:
        """Sample with given orthonormal rows (m, B²), and reconstruct by their transpose."""
        rows, area = phi.shape
        self.sampling.weight.copy_(phi.reshape(self.sampling.weight.shape))
        self.reconstruction.initial.weight.copy_(phi.T.reshape(area, rows, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        made: Tensor = self.reconstruction(self.sampling(pictures))
        if self.refinement is not None:
            made = self.refinement(made, self.refinement.measured_of(pictures))
        return cast(Tensor, self.after(made))
