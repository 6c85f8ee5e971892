"""A CSNet for camera resolutions: deep reconstruction at a quarter of the height and width.

Use this where a CPU must keep up with a camera. The paper's CSNet (B = 32) runs its 3×3 layers at full resolution,
about 110 thousand multiplications a pixel; here they run on 4×4 pixels at once, 23 thousand with five blocks.

    q ──▶ × step ──┬─▶ 1×1 → B² ─▶ shuffle B ────────────────────────────────────────────▶ + ─▶ picture
                   └─▶ 1×1 → 64·(B/4)² ─▶ shuffle B/4 ─▶ residual 3×3 … ─▶ 3×3 → 16 ─▶ shuffle 4 ─▶ ┘
                         initial (above) and deep reconstruction (below), as in the paper
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoder.sampling import MID_GREY
from protos.rules import MAX_LEVEL
from train.networks.phi import energy

WHITE = 255.0
SCALE = 4
"""One place of the deep features stands for SCALE × SCALE pixels."""
_NOISE_CHANNELS, _NOISE_SIDE = 4, 96
"""Of the random pattern, in places of the deep features: it begins again after 384 pixels."""


class Sampling(nn.Module):
    """S with the quantiser in the loop: pictures (N, 1, H, W) in [0, 1] → quantised measurements (N, m, H/B, W/B).

    Rows of Φ are kept at unit length and each step as fine as int8 allows (``encoder.sampling.finest_steps``), so
    training can't buy precision with longer rows. Rounding passes its gradient straight through. The first
    ``frozen_rows``, of unit length, stay as they are to the bit.
    """

    head: Tensor

    def __init__(self, phi: Tensor, frozen_rows: int = 0) -> None:
        super().__init__()
        self.block = round(phi.shape[1] ** 0.5)
        self.register_buffer("head", phi[:frozen_rows].clone())
        self.tail = nn.Parameter(phi[frozen_rows:].clone())

    def phi(self) -> Tensor:
        """(m, B²), rows of unit length."""
        return torch.cat([self.head, functional.normalize(self.tail, dim=1)])

    def steps(self) -> Tensor:
        """(m,), on the 0..255 pixel scale."""
        return MID_GREY * self.phi().detach().abs().sum(1) / MAX_LEVEL

    def forward(self, picture: Tensor) -> Tensor:
        levels = (self.phi() / self.steps()[:, None]).reshape(-1, 1, self.block, self.block)
        measurement = functional.conv2d(picture * WHITE - MID_GREY, levels, stride=self.block)
        return measurement + (measurement.round().clamp(-MAX_LEVEL, MAX_LEVEL) - measurement).detach()


class Residual(nn.Module):
    """x + 3×3(ReLU(3×3(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(functional.relu(self.first(x)))
        return out


class Reconstructor(nn.Module):
    """G: quantised measurements (N, m, H/B, W/B) → pictures (N, 1, H, W), about [0, 1], not clipped.

    Args:
        phi: (m, B²), where the initial reconstruction starts from (its transpose).
        steps: (m,), quantiser steps on the 0..255 pixel scale.
        channels: width of the deep features.
        blocks: number of residual blocks.
        grain: give the deep features a fixed random pattern to draw from. Without one, G draws the same in equal
            blocks, so that whatever a veil draws is woven with their period; with one it can be irregular.
    """

    steps: Tensor
    noise: Tensor

    def __init__(self, phi: Tensor, steps: Tensor, channels: int = 64, blocks: int = 5, grain: bool = False) -> None:
        super().__init__()
        rows, area = phi.shape
        self.block = round(area**0.5)
        self.register_buffer("steps", steps.detach().clone().reshape(1, rows, 1, 1))
        self.initial = nn.Conv2d(rows, area, 1, bias=False)
        self.features = nn.Conv2d(rows, channels * (self.block // SCALE) ** 2, 1)
        self.deep = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
        self.last = nn.Conv2d(channels, SCALE**2, 3, padding=1)
        self.grain = nn.Conv2d(_NOISE_CHANNELS, channels, 3, padding=1, bias=False) if grain else None
        if self.grain is not None:
            shape = (1, _NOISE_CHANNELS, _NOISE_SIDE, _NOISE_SIDE)
            self.register_buffer("noise", torch.randn(shape, generator=torch.Generator().manual_seed(0)))
            nn.init.zeros_(self.grain.weight)
        with torch.no_grad():
            self.initial.weight.copy_(phi.detach().T.reshape(area, rows, 1, 1))
            self.last.weight.mul_(0.1)

    def forward(self, quantised: Tensor) -> Tensor:
        measurement = quantised * (self.steps / WHITE)
        initial = functional.pixel_shuffle(self.initial(measurement), self.block)
        features = functional.pixel_shuffle(self.features(measurement), self.block // SCALE)
        if self.grain is not None:
            rows, columns = (torch.arange(side) % _NOISE_SIDE for side in features.shape[-2:])
            features = features + self.grain(self.noise[:, :, rows][:, :, :, columns])
        deep = functional.pixel_shuffle(self.last(self.deep(features)), SCALE)
        return initial + deep + MID_GREY / WHITE


class QuarterCSNet(nn.Module):
    """S, the quantiser and G together: pictures (N, 1, H, W) in [0, 1] → reconstructions of the same shape."""

    def __init__(self, phi: Tensor, frozen_rows: int = 0, channels: int = 64, blocks: int = 5) -> None:
        super().__init__()
        self.sampling = Sampling(phi, frozen_rows)
        self.reconstructor = Reconstructor(self.sampling.phi(), self.sampling.steps(), channels, blocks)

    @torch.no_grad()
    def order_rows(self, moment: Tensor) -> None:
        """Put the most energetic of the trained rows first, everywhere; frozen rows keep their places.

        Args:
            moment: second moment of blocks, as ``train.networks.phi.covariance`` gives it.
        """
        frozen = len(self.sampling.head)
        order = energy(self.sampling.phi(), moment)[frozen:].argsort(descending=True)
        places = torch.cat([torch.arange(frozen), frozen + order])
        self.sampling.tail.copy_(self.sampling.tail[order])
        self.reconstructor.steps.copy_(self.sampling.steps().reshape(1, -1, 1, 1))
        for layer in (self.reconstructor.initial, self.reconstructor.features):
            layer.weight.copy_(layer.weight[:, places])

    def forward(self, picture: Tensor) -> Tensor:
        self.reconstructor.steps.copy_(self.sampling.steps().reshape(1, -1, 1, 1))
        out: Tensor = self.reconstructor(self.sampling(picture))
        return out
