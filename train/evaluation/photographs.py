"""What a veil leaves readers, beside what its controls leave them, and what it costs.

Rows are renditions of the same photographs: the original, the plain reconstruction, the veiled one, and two controls
that lose as much PSNR as the veil: the plain one with Gaussian noise, and blurred. Columns are ways to the reader: as
it is, as JPEG 75, and with the notch that knows the block grid.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data.labelled import Labelled
from train.data.photographs import read_gray
from train.evaluation.small import jpeg_75
from train.networks.quarter import QuarterCSNet, Reconstructor
from train.objectives.reconstruction import psnr
from train.purifiers import blur, notch
from train.readers import Reader

WAYS = ("as is", "JPEG 75", "notch")
RENDITIONS = ("original", "plain", "veiled", "noise", "blur")
_SHARPEST, _SOFTEST = 0.2, 8.0


@dataclass
class VeilTable:
    """Recognition by reader, rendition and way, as right answers; mean PSNR by rendition."""

    pictures: int = 0
    right: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)

    def recognition(self, reader: str, rendition: str, way: str) -> float:
        """Percent of pictures read rightly."""
        return 100 * self.right[reader][rendition][way] / self.pictures

    def as_json(self) -> dict[str, Any]:
        """Plain values: PSNR in dB and recognition in percent."""
        readings = {
            reader: {
                rendition: {way: round(self.recognition(reader, rendition, way), 1) for way in WAYS}
                for rendition in table
            }
            for reader, table in self.right.items()
        }
        fidelity = {name: round(value / self.pictures, 3) for name, value in self.fidelity.items()}
        return {"pictures": self.pictures, "psnr": fidelity, "recognition": readings}


def measure_veil(
    base: QuarterCSNet,
    veiled: Reconstructor,
    pictures: Sequence[Labelled],
    readers: Mapping[str, Reader],
    progress: Callable[[], None] = lambda: None,
) -> VeilTable:
    """Fill the table, one picture at a time, every rendition rounded to 8 bits as a viewer gets it."""
    table = VeilTable(right={name: {r: dict.fromkeys(WAYS, 0) for r in RENDITIONS} for name in readers})
    generator = torch.Generator().manual_seed(0)
    for item in pictures:
        original = torch.from_numpy(read_gray(item.path).copy())[None, None].float() / 255
        for rendition, picture in renditions(base, veiled, original, generator).items():
            table.fidelity[rendition] = table.fidelity.get(rendition, 0.0) + float(psnr(picture, original))
            for way in WAYS:
                seen = _on_the_way(picture, way, base.sampling.block)
                for name, reader in readers.items():
                    with torch.no_grad():
                        table.right[name][rendition][way] += int(reader(seen).argmax(1)) == item.label
        table.pictures += 1
        progress()
    return table


@torch.no_grad()
def renditions(
    base: QuarterCSNet, veiled: Reconstructor, original: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """A photograph (1, 1, H, W) in [0, 1] in each of ``RENDITIONS``, 8-bit values."""
    side = base.sampling.block
    height, width = original.shape[-2:]
    padded = torch.nn.functional.pad(original, (0, -width % side, 0, -height % side), mode="replicate")
    quantised = base.sampling(padded)
    plain, veil = (_seen(net(quantised)[..., :height, :width]) for net in (base.reconstructor, veiled))
    target = float(psnr(veil, original))
    extra = max(0.0, float((veil - original).square().mean() - (plain - original).square().mean()))
    noisy = _seen(plain + extra**0.5 * torch.randn(plain.shape, generator=generator))
    return {
        "original": original,
        "plain": plain,
        "veiled": veil,
        "noise": noisy,
        "blur": _seen(blur(plain, _sigma_of_equal_psnr(plain, original, target))),
    }


def _sigma_of_equal_psnr(plain: Tensor, original: Tensor, target: float) -> float:
    sharp, soft = _SHARPEST, _SOFTEST
    for _ in range(10):
        middle = (sharp + soft) / 2
        if float(psnr(blur(plain, middle), original)) > target:
            sharp = middle
        else:
            soft = middle
    return soft


def _seen(picture: Tensor) -> Tensor:
    return (picture * 255).round().clamp(0, 255) / 255


def _on_the_way(picture: Tensor, way: str, block: int) -> Tensor:
    if way == "as is":
        return picture
    if way == "notch":
        return _seen(notch(picture, block))
    pixels = (picture[0, 0] * 255).round().to(torch.uint8).numpy()
    return torch.from_numpy(np.asarray(jpeg_75(pixels)))[None, None].float() / 255
