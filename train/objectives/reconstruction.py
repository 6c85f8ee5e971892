"""How far a reconstruction is from the picture: equation (5) and PSNR."""

import torch
from torch import Tensor

WHITE = 255.0


def squared_error(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """Mean squared error per pixel, of pictures in [0, 1].

    Equation (5) of the paper up to a constant: it sums over pixels and halves, this divides by their number, so that
    weights beside it don't depend on the size of the crop.
    """
    return (reconstruction - picture).square().mean()


def log_error(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """Mean over pictures (N, 1, H, W) in [0, 1] of the logarithm of a picture's mean squared error, rounding included.

    10 / ln 10 = 4.34 times it, with the sign changed, is their mean PSNR in dB, but for clipping, which this leaves
    out: the same error costs a picture that is reconstructed well more than one that isn't.
    """
    error = (reconstruction - picture).square().flatten(1).mean(1)
    return (error + 1 / (12 * WHITE**2)).log().mean()


def psnr(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """PSNR in dB of 8-bit pictures, each (N, 1, H, W) in [0, 1]: (N,). The reconstruction is clipped and rounded."""
    seen = (reconstruction * WHITE).clamp(0, WHITE).round()
    error = (seen - picture * WHITE).square().flatten(1).mean(1)
    return 10 * torch.log10(WHITE**2 / error.clamp_min(1e-10))
