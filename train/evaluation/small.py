"""What readers read of a model's pictures on the whole test set, and how near those are to the originals.

Renditions of a model: its pictures themselves, and two controls that cost as much PSNR and are made from the pictures
of the CSNet that it extends: noise and blur. Ways to a reader: as they are, and purified by programs in common use.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from train import checkpoint
from train.data.small import Pictures
from train.devices import Device, exactly
from train.models import answers, read_rightly
from train.networks.classifiers.classifier import CLASSES, Classifier
from train.objectives.reconstruction import psnr
from train.purifiers import blur

AS_IS = "as is"
ITSELF, NOISE, BLUR = "itself", "noise", "blur"
CONTROLS = (NOISE, BLUR)

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_HALVINGS, _UTMOST = 12, 8


def jpeg_75(picture: "np.ndarray[Any, np.dtype[np.uint8]]") -> "cv2.typing.MatLike":
    """A gray picture as OpenCV's JPEG of quality 75 leaves it."""
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 75])
    return np.asarray(cv2.imdecode(np.asarray(data), cv2.IMREAD_GRAYSCALE))


PURIFIERS: Mapping[str, Callable[["np.ndarray[Any, np.dtype[np.uint8]]"], "cv2.typing.MatLike"]] = {
    "JPEG 75": jpeg_75,
    "blur 0.7": lambda picture: cv2.GaussianBlur(picture, (0, 0), 0.7),
    "median 3": lambda picture: cv2.medianBlur(picture, 3),
}


EVALUATION = "evaluation.json"
"""What ``measure_model`` gave, in the run's folder."""


@dataclass(frozen=True)
class Reader:
    """A finished classifier, and how it is asked.

    Attributes:
        net: in evaluation mode.
        on_originals: percent of them that it was measured to read.
        closely: looks at controls and purified pictures too.
    """

    net: Classifier
    on_originals: float
    closely: bool = True


def measure_model(
    made: Pictures,
    plain: Pictures | None,
    test: Pictures,
    readers: Mapping[str, Reader],
    purified: bool,
    device: Device,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """PSNR in dB, SSIM and recognition in percent, as plain values.

    Args:
        made: a model's pictures.
        plain: those of the CSNet that it extends, which controls are made from; or None.
        test: originals.
        readers: by name.
        purified: look at controls and purified pictures too, by the readers that look closely.
        progress: called after every pass of a reader; there are ``passes`` of them.
    """
    by = checkpoint.provenance() | {"device": device.told}
    renditions = {ITSELF: made}
    if plain is not None and purified:
        renditions |= controls(plain, test, mean_psnr(renditions[ITSELF], test), device)
    result: dict[str, Any] = {"pictures": len(test)}
    result["psnr"] = {name: round(mean_psnr(pictures, test), 4) for name, pictures in renditions.items()}
    result["ssim"] = {name: round(mean_ssim(pictures, test), 5) for name, pictures in renditions.items()}
    looked_at = {(name, AS_IS): pictures for name, pictures in renditions.items()}
    if purified:
        looked_at |= {(ITSELF, way): purify(renditions[ITSELF], way) for way in PURIFIERS}
        result["psnr_purified"] = {w: round(mean_psnr(looked_at[ITSELF, w], test), 4) for w in PURIFIERS}
    result["recognition"], result["mapped_back"] = {}, {}
    for reader, told in readers.items():
        table: dict[str, dict[str, float]] = {}
        for (name, way), pictures in looked_at.items():
            if told.closely or (name, way) == (ITSELF, AS_IS):
                answered = answers(told.net, pictures, device)
                table.setdefault(name, {})[way] = round(read_rightly(answered, test.y), 2)
                if (name, way) == (ITSELF, AS_IS) and told.closely:
                    result["mapped_back"][reader] = round(mapped_back(answered, test.y), 2)
                progress()
        result["recognition"][reader] = table
    result["originals"] = {reader: round(told.on_originals, 2) for reader, told in readers.items()}
    return result | {"measured": by}


def mapped_back(answered: Tensor, classes: Tensor) -> float:
    """Percent read rightly if each answer is taken for the class that most often gets it.

    Where pictures are led to wrong classes, and always to the same ones, a reader that knows these reads them for all
    that. Which they are is learned from every other picture, and held against the rest; then the other way round.

    Args:
        answered: classes (N,).
        classes: those that the pictures are of, (N,).
    """
    halves, found = (slice(0, None, 2), slice(1, None, 2)), []
    for learned, held in (halves, halves[::-1]):
        how_often = torch.zeros(CLASSES, CLASSES)
        how_often.index_put_((answered[learned], classes[learned]), torch.tensor(1.0), accumulate=True)
        found.append((how_often.argmax(1)[answered[held]] == classes[held]).double())
    return 100 * float(torch.cat(found).mean())


def passes(readers: Iterable[Reader], has_base: bool, purified: bool) -> int:
    """How many times a reader looks through all test pictures in ``measure_model``."""
    closely = len(CONTROLS) * (has_base and purified) + len(PURIFIERS) * purified
    return sum(1 + closely * reader.closely for reader in readers)


def purify(pictures: Pictures, way: str) -> Pictures:
    """Pictures as OpenCV leaves them after one of ``PURIFIERS``."""
    made = [np.asarray(PURIFIERS[way](picture)) for picture in pictures.x[:, 0].numpy()]
    return Pictures(torch.from_numpy(np.stack(made))[:, None], pictures.y)


def controls(plain: Pictures, originals: Pictures, target: float, device: Device) -> dict[str, Pictures]:
    """The plain pictures with as much Gaussian noise, and blurred as much, as brings their mean PSNR to a target.

    Where the plain ones have no more than that already, they stay as they are. Blur takes a picture no further than to
    its mean: where that has more than is asked, it is the control.

    Args:
        plain: pictures of a CSNet.
        originals: of the same.
        target: mean PSNR in dB.
        device: that the search runs on.
    """
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(plain.x.shape, generator=generator).to(device.torch)
    picture = plain.x.to(device.torch).float() / 255
    originals, labels = originals.to(device.torch), plain.y.to(device.torch)

    def made(name: str, strength: float) -> Pictures:
        return _seen(picture + strength * draw if name == NOISE else blur(picture, strength), labels)

    if mean_psnr(plain, originals.to(torch.device("cpu"))) <= target:
        return dict.fromkeys(CONTROLS, plain)
    found = {}
    with exactly():
        for name, most in ((NOISE, 0.3), (BLUR, 4.0)):
            low, high = 1e-3, most
            while high < _UTMOST * most and mean_psnr(made(name, high), originals) > target:
                low, high = high, 2 * high
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                if mean_psnr(made(name, middle), originals) > target:
                    low = middle
                else:
                    high = middle
            found[name] = made(name, low).to(torch.device("cpu"))
    return found


def mean_psnr(pictures: Pictures, originals: Pictures) -> float:
    """Mean of the pictures' PSNR in dB."""
    return float(psnr(pictures.x.float() / 255, originals.x.float() / 255).mean())


def mean_ssim(pictures: Pictures, originals: Pictures) -> float:
    """Mean SSIM (Wang et al. 2004): Gaussian window of 11, σ 1.5, where the window fits wholly."""
    line = torch.exp(-((torch.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    line = line / line.sum()

    def smooth(x: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(x, line.reshape(1, 1, 1, -1)), line.reshape(1, 1, -1, 1))

    a, b = pictures.x.float() / 255, originals.x.float() / 255
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    return float((likeness / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2))).mean())


def _seen(pictures: Tensor, labels: Tensor) -> Pictures:
    return Pictures((pictures * 255).round().clamp(0, 255).to(torch.uint8), labels)
