"""Draw the clip that the demo plays, from photographs that may be redistributed: ``python -m benchmarks.draw_clip``.

Needs scikit-image, whose wheel carries them: NASA's portrait of Eileen Collins (public domain), Chelsea the cat (CC0),
a cup of coffee (CC0) and a rocket on its pad (CC0). The camera pans and zooms over each.
"""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, RATE, SECONDS_EACH = 448, 336, 15, 2.5
CLIP = Path(__file__).parent / "data" / "demo.mp4"
# (left, top, width of the window) at the start and at the end, as shares of the photograph's width and height.
_MOVES = {
    "astronaut": ((0.00, 0.00, 0.80), (0.20, 0.02, 0.62)),
    "chelsea": ((0.00, 0.00, 0.75), (0.24, 0.04, 0.72)),
    "coffee": ((0.22, 0.00, 0.76), (0.02, 0.05, 0.84)),
    "rocket": ((0.20, 0.10, 0.50), (0.10, 0.00, 0.80)),
}


def draw(
    photograph: NDArray[np.uint8], start: tuple[float, ...], end: tuple[float, ...], share: float
) -> NDArray[np.uint8]:
    """The window of a photograph (H, W, 3) at ``share`` of the way: (HEIGHT, WIDTH, 3)."""
    height, width = photograph.shape[:2]
    left, top, span = (a + (b - a) * share for a, b in zip(start, end, strict=True))
    zoom = span * width / WIDTH
    matrix = np.array([[zoom, 0, left * width], [0, zoom, top * height]], np.float32)
    flags = cv2.INTER_AREA | cv2.WARP_INVERSE_MAP if zoom > 1 else cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    drawn = cv2.warpAffine(photograph, matrix, (WIDTH, HEIGHT), flags=flags, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(drawn, np.uint8)


def main() -> None:
    """Write the clip."""
    from skimage import data

    CLIP.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(CLIP), cv2.VideoWriter.fourcc(*"mp4v"), RATE, (WIDTH, HEIGHT))
    frames = round(SECONDS_EACH * RATE)
    for name, (start, end) in _MOVES.items():
        photograph = np.asarray(getattr(data, name)(), np.uint8)[..., ::-1]
        for index in range(frames):
            writer.write(draw(np.ascontiguousarray(photograph), start, end, index / (frames - 1)))
    writer.release()


if __name__ == "__main__":
    main()
