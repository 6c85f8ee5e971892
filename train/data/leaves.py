"""Drawn pictures with the statistics of photographs: dead leaves, discs of all sizes that hide one another.

C. Bordenave, Y. Gousseau, F. Roueff: The dead leaves model: a general tessellation modeling occlusion. Adv. Appl. Prob.
38 (2006) 31-46. For where a photograph can't be shipped, or isn't there.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

_SMALLEST, _DENSITY = 2.0, 60
_SOFT = 0.7


def dead_leaves(side: int, seed: int) -> NDArray[np.uint8]:
    """A gray picture (side, side); radii are spread as r⁻³, so that it looks alike at every scale."""
    draw = np.random.default_rng(seed)
    picture = np.full((side, side), 128, np.uint8)
    count, largest = side * _DENSITY // 4, side / 3
    radii = _SMALLEST / np.sqrt(1 - draw.random(count) * (1 - (_SMALLEST / largest) ** 2))
    for radius, (x, y), grey in zip(
        radii, draw.integers(0, side, (count, 2)), draw.integers(0, 256, count), strict=True
    ):
        cv2.circle(picture, (int(x), int(y)), int(radius), int(grey), -1, cv2.LINE_AA)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), _SOFT), np.uint8)
