"""How near a picture is to its original: PSNR and SSIM of 8-bit gray pictures."""

import cv2
import numpy as np
from numpy.typing import NDArray

_WINDOW, _SIGMA = (11, 11), 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(picture: NDArray[np.uint8], original: NDArray[np.uint8]) -> float:
    """PSNR in dB; 148 and not infinite for equal pictures, so that means and JSON stay numbers."""
    error = float(np.mean((picture.astype(np.float64) - original.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-10)))


def ssim(picture: NDArray[np.uint8], original: NDArray[np.uint8]) -> float:
    """Mean SSIM as Wang et al. 2004 define it: Gaussian window of 11, σ 1.5, where the window fits wholly.

    Raises:
        ValueError: a side of less than 11 pixels.
    """
    if min(picture.shape) < _WINDOW[0]:
        raise ValueError(f"SSIM of {picture.shape}: sides of 11 pixels and more are needed")
    a, b = picture.astype(np.float64), original.astype(np.float64)

    def smooth(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(x, _WINDOW, _SIGMA), np.float64)[5:-5, 5:-5]

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    return float(np.mean(likeness / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2))))
