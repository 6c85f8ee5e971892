"""G's pictures refined, beyond the paper: made to agree with what was measured, corrected, made to agree again.

x' ─▶ agreeing ─┬────────────────────────────────────────────▶ + ─▶ agreeing ─▶ x"
                └─▶ half size ─▶ 3×3 → 96 ─▶ 4 × 2 layers ─▶ ┘

About 170 thousand multiplications a pixel, and two samplings and their transposes.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Refinement(nn.Module):
    """Pictures of G, and what was measured → better pictures, of which S would measure just that.

    What S measures of a picture is its part in the span of Φ's rows. There a reconstruction need not err, and what
    the layers correct is the rest. They start with correcting nothing.

    Args:
        rows: an orthonormal basis of that span, (m, B²).
        block: B.
        channels: at half the height and width, where the layers are.
        blocks: of two layers and a shortcut.
    """

    rows: Tensor

    def __init__(self, rows: Tensor, block: int, channels: int = 96, blocks: int = 4) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("rows", rows.float().reshape(-1, 1, block, block).clone())
        self.deep = _Correction(channels, blocks)

    def measured_of(self, pictures: Tensor) -> Tensor:
        """Coordinates of pictures (N, 1, H, W) by the basis: (N, m, H/B, W/B)."""
        return functional.conv2d(pictures, self.rows, stride=self.block)

    def agreeing(self, pictures: Tensor, measured: Tensor, sent: Tensor | None = None) -> Tensor:
        """The nearest pictures that have given coordinates.

        Args:
            sent: 1 where a coordinate is known, 0 where it isn't, (N, m, 1, 1); without it all are.
        """
        missing = measured - self.measured_of(pictures)
        if sent is not None:
            missing = missing * sent
        return pictures + functional.conv_transpose2d(missing, self.rows, stride=self.block)

    def forward(
        self,
        pictures: Tensor,
        measured: Tensor,
        sent: Tensor | None = None,
        deep: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As above; ``deep`` is what a loop runs in place of the layers: themselves, faster."""
        pictures = self.agreeing(pictures, measured, sent)
        return self.agreeing(pictures + (deep or self.deep)(pictures), measured, sent)


class _Correction(nn.Module):
    """What pictures lack, by layers that see them as about zero and of about unit deviation."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        first, last = nn.Conv2d(4, channels, 3, padding=1), nn.Conv2d(channels, 4, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        residual = (_Residual(channels) for _ in range(blocks))
        self.layers = nn.Sequential(nn.PixelUnshuffle(2), first, *residual, last, nn.PixelShuffle(2))

    def forward(self, pictures: Tensor) -> Tensor:
        return cast(Tensor, self.layers((pictures - 0.5) * 4)) / 4


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.layers(x))


def rows_sent(levels: Tensor) -> Tensor:
    """Which rows a camera sent of levels (N, m, H/B, W/B), as 0 and 1 (N, m, 1, 1): all up to the last with a level.

    It may send fewer than there are, the first ones; the rest come as zeros.
    """
    count = levels.shape[1]
    there = levels.abs().amax((2, 3)).clamp_max(1.0)
    from_each_on = torch.ones(count, count, dtype=levels.dtype, device=levels.device).tril()
    return (there @ from_each_on).clamp_max(1.0)[:, :, None, None]
