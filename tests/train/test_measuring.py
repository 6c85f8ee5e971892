"""What is measured of a model: recognition, fidelity, controls and purifiers."""

import numpy as np
import pytest
import torch

from benchmarks.fidelity import ssim
from tests.train.schedules import CPU
from train.data.small import Pictures, SmallSet
from train.devices import exactly
from train.evaluation.small import (
    AS_IS,
    BLUR,
    ITSELF,
    NOISE,
    PURIFIERS,
    Reader,
    controls,
    mapped_back,
    mean_psnr,
    mean_ssim,
    measure_model,
    passes,
    purify,
)
from train.models import pictures_of
from train.networks.classifiers.classifier import Classifier
from train.networks.csnet import CSNet


class Bright(torch.nn.Module):
    """Says 9 of a picture brighter than mid-grey, else 0."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        level = pictures.mean((1, 2, 3)) * 0.25
        scores = torch.zeros(len(pictures), 10)
        scores[:, 9], scores[:, 0] = level, -level
        return scores


def averaging() -> CSNet:
    """One that gives each picture its mean brightness."""
    net = CSNet(1)
    net.start_from(torch.full((1, 1024), 1 / 32))
    torch.nn.init.zeros_(net.reconstruction.deep[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(net.reconstruction.deep[-1].bias)  # type: ignore[arg-type]
    return net


def test_recognition_is_counted_rightly() -> None:
    """Four flat pictures that any CSNet from principal directions gives back; one of the labels is wrong."""
    flat = torch.tensor([30, 60, 200, 220], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 32, 32).contiguous()
    test = Pictures(flat, torch.tensor([0, 9, 9, 9]))
    made = pictures_of(averaging(), test, CPU)
    reader = Classifier(torch.nn.Identity(), Bright()).eval()
    counted: list[None] = []
    readers = {"bright": Reader(reader, 75.0), "surrogate": Reader(reader, 75.0, closely=False)}
    result = measure_model(made, made, test, readers, True, CPU, lambda: counted.append(None))
    assert result["recognition"]["bright"][ITSELF] == {AS_IS: 75.0} | dict.fromkeys(PURIFIERS, 75.0)
    assert result["recognition"]["bright"][NOISE] == {AS_IS: 75.0}
    assert result["recognition"]["surrogate"] == {ITSELF: {AS_IS: 75.0}}
    assert result["mapped_back"] == {"bright": 50.0}, "of every other picture no map is learned that fits the rest"
    assert result["originals"] == {"bright": 75.0, "surrogate": 75.0}
    assert result["psnr"][ITSELF] > 100
    assert result["ssim"][ITSELF] == pytest.approx(1.0, abs=1e-4)
    assert len(counted) == passes(readers.values(), True, True) == 7


def test_answers_that_are_always_wrong_in_the_same_way_are_mapped_back() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(10, (2000,), generator=generator)
    assert mapped_back((classes + 3) % 10, classes) == 100.0
    assert mapped_back(torch.randint(10, (2000,), generator=generator), classes) < 15
    paired = torch.where(torch.rand(2000, generator=generator) < 0.7, (classes + 3) % 10, classes)
    assert mapped_back(paired, classes) == pytest.approx(70, abs=4)


def test_controls_cost_as_much_as_is_asked(data: SmallSet) -> None:
    plain = Pictures(data.test.x, data.test.y)
    for control in controls(plain, data.test, 30.0, CPU).values():
        assert mean_psnr(control, data.test) == pytest.approx(30.0, abs=0.1)
    found = controls(plain, data.test, 25.0, CPU)
    assert not torch.equal(found[NOISE].x, found[BLUR].x)
    assert torch.equal(found[NOISE].y, data.test.y)
    far = {name: mean_psnr(control, data.test) for name, control in controls(plain, data.test, 9.0, CPU).items()}
    assert far[NOISE] == pytest.approx(9.0, abs=0.1)
    mean = data.test.x.float().mean((2, 3), keepdim=True).round().byte().expand_as(data.test.x)
    assert far[BLUR] == pytest.approx(mean_psnr(Pictures(mean, data.test.y), data.test), abs=0.5)
    for control in controls(found[NOISE], data.test, 40.0, CPU).values():
        assert torch.equal(control.x, found[NOISE].x), "they have less already"


def test_what_is_measured_is_float32_in_full_and_what_is_trained_as_before() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        with exactly():
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", before[1])
    finally:
        torch.set_float32_matmul_precision(before[0])


def test_purifiers_are_those_of_opencv_and_keep_the_picture(data: SmallSet) -> None:
    for way in PURIFIERS:
        seen = purify(data.test, way)
        assert not torch.equal(seen.x, data.test.x)
        assert mean_psnr(seen, data.test) > 15


def test_ssim_is_the_projects_other_definition(data: SmallSet) -> None:
    """benchmarks.fidelity is held against scikit-image's."""
    draw = torch.randn(data.test.x.shape, generator=torch.Generator().manual_seed(0))
    noisy = Pictures((data.test.x.float() + 20 * draw).clamp(0, 255).byte(), data.test.y)
    theirs = [ssim(a.numpy(), b.numpy()) for a, b in zip(noisy.x[:10, 0], data.test.x[:10, 0], strict=True)]
    assert mean_ssim(noisy[:10], data.test[:10]) == pytest.approx(float(np.mean(theirs)), abs=1e-4)
