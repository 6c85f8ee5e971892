"""What happens to a picture on its way to a reader, by accident or on purpose, as differentiable functions.

Pictures are (N, 1, H, W) in [0, 1]. A veil that is trained without them stops working at the first JPEG.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

_LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29),
    *(51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121),
    *(120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
"""ITU-T T.81, table K.1."""


def jpeg(pictures: Tensor, quality: int) -> Tensor:
    """Baseline JPEG of gray pictures with libjpeg's scaling of the standard table, rounding made differentiable.

    Rounding keeps its error's cube (Shin and Song 2017), so that gradients don't vanish.
    """
    height, width = pictures.shape[-2:]
    padded = functional.pad(pictures, (0, -width % 8, 0, -height % 8), mode="replicate") * 255 - 128
    transform, table = dct().to(pictures.device), jpeg_table(quality).to(pictures.device)
    levels = functional.conv2d(padded, transform, stride=8) / table
    rounded = levels.round().detach()
    rounded = rounded + (levels - rounded) ** 3
    out = functional.conv_transpose2d(rounded * table, transform, stride=8)
    return ((out[..., :height, :width] + 128) / 255).clamp(0, 1)


def jpeg_table(quality: int) -> Tensor:
    """What the 64 coefficients of a block are divided by, of gray pixels 0 to 255: (1, 64, 1, 1)."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(_LUMINANCE) * scale + 50) / 100).floor().clamp(1, 255).reshape(1, 64, 1, 1)


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, cut off at three sigma."""
    line = gaussian(sigma, pictures.device)
    line, radius = line / line.sum(), len(line) // 2
    padded = functional.pad(pictures, (radius,) * 4, mode="replicate")
    across = functional.conv2d(padded, line.reshape(1, 1, 1, -1))
    return functional.conv2d(across, line.reshape(1, 1, -1, 1))


def gaussian(sigma: float, device: torch.device | None = None) -> Tensor:
    """The bell of a blur, one at its middle: (2·radius + 1,)."""
    radius = max(1, math.ceil(3 * sigma))
    return torch.exp(-(torch.arange(-radius, radius + 1.0, device=device) ** 2) / (2 * sigma**2))


def noise(pictures: Tensor, sigma: float, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian noise, sigma in [0, 1] of white."""
    return pictures + sigma * torch.randn(pictures.shape, generator=generator).to(pictures.device)


def resize(pictures: Tensor, factor: float) -> Tensor:
    """Smaller by a factor, as a far larger picture comes to a reader."""
    return functional.interpolate(pictures, scale_factor=factor, mode="bilinear", antialias=True)


def notch(pictures: Tensor, block: int) -> Tensor:
    """Take away whatever repeats with the blocks: the mean, over a picture's blocks, of what a blur takes away.

    A purifier that knows the block grid; it gave readers back half of an unshaped veil.
    """
    height, width = (side // block * block for side in pictures.shape[-2:])
    high = (pictures - blur(pictures, 1.5))[..., :height, :width]
    tiles = high.reshape(-1, 1, height // block, block, width // block, block)
    pattern = tiles.mean((2, 4))
    rows, columns = (-(-side // block) for side in pictures.shape[-2:])
    repeated = pattern.repeat(1, 1, rows, columns)[..., : pictures.shape[-2], : pictures.shape[-1]]
    return pictures - repeated


def median(pictures: Tensor) -> Tensor:
    """Median of 3×3 pixels, edges repeated; the gradient goes to the pixel that was the median."""
    return torch.stack(windows(functional.pad(pictures, (1,) * 4, mode="replicate"), 3)).median(0).values


def windows(around: Tensor, side: int) -> list[Tensor]:
    """The ``side``² values around every place, row by row, of what is ``side`` // 2 larger on every side."""
    height, width = (each - side + 1 for each in around.shape[-2:])
    return [around[..., row : row + height, column : column + width] for row in range(side) for column in range(side)]


def random_purifier(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A small picture (32×32) purified in one way drawn at random; its size stays."""
    draw = partial(_draw, generator)
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: jpeg(pictures, round(draw(60, 92))),
        lambda: blur(pictures, draw(0.4, 0.9)),
        lambda: median(pictures),
        lambda: noise(pictures, draw(0.01, 0.04), generator),
        lambda: _smaller_and_back(pictures, draw(0.6, 0.9)),
    )
    return ways[int(draw(0, len(ways)))]()


def _draw(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _smaller_and_back(pictures: Tensor, factor: float) -> Tensor:
    size = pictures.shape[-2:]
    return functional.interpolate(resize(pictures, factor), size=size, mode="bilinear", antialias=True)


def random_way(pictures: Tensor, block: int, generator: torch.Generator) -> Tensor:
    """One way to a reader, drawn at random: a notch or not, then most often JPEG, else blur, less size or noise."""
    draw = partial(_draw, generator)
    if draw(0, 1) < 0.4:
        pictures = notch(pictures, block)
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: jpeg(pictures, round(draw(60, 92))),
        lambda: jpeg(pictures, round(draw(60, 92))),
        lambda: jpeg(pictures, round(draw(60, 92))),
        lambda: blur(pictures, draw(0.4, 1.0)),
        lambda: resize(pictures, draw(0.5, 0.9)),
        lambda: noise(pictures, draw(0.005, 0.03), generator),
        lambda: pictures,
    )
    return ways[int(draw(0, len(ways)))]()


@cache
def dct() -> Tensor:
    """The 64 orthonormal basis pictures of the 8×8 DCT, as a convolution's weight: (64, 1, 8, 8)."""
    k = torch.arange(8.0)
    line = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) * 0.5
    line[0] /= math.sqrt(2)
    return torch.einsum("ux,vy->uvxy", line, line).reshape(64, 1, 8, 8)
