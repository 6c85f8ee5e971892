import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.fidelity import psnr as psnr_of_pixels
from train.objectives.reconstruction import log_error, psnr, squared_error
from train.objectives.veil import likeness, repetition, unreadable, visibility
from train.purifiers import blur, jpeg, median, noise, notch, random_purifier, random_way


@pytest.fixture(scope="module")
def picture(photographs: list[NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(photographs[0])[None, None].float() / 255


def test_psnr_is_that_of_the_8_bit_pictures(picture: torch.Tensor) -> None:
    other = (picture + 0.03).clamp(0, 1)
    pixels = [np.asarray((p[0, 0] * 255).round(), np.uint8) for p in (other, picture)]
    assert float(psnr(other, picture)) == pytest.approx(psnr_of_pixels(*pixels), abs=1e-4)


def test_squared_error_is_the_mean_over_pixels() -> None:
    assert float(squared_error(torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, 1, 4, 4))) == 0.25


def test_log_error_is_the_mean_psnr_with_its_sign_changed(picture: torch.Tensor) -> None:
    both = torch.cat([picture, picture])
    draw = torch.randn(both.shape, generator=torch.Generator().manual_seed(0))
    other = (both + torch.tensor([0.003, 0.1]).reshape(2, 1, 1, 1) * draw).clamp(0, 1)
    decibels = -10 / math.log(10) * float(log_error(other, both))
    assert decibels == pytest.approx(float(psnr(other, both).mean()), abs=0.02)
    exact = both.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(log_error(exact, both), exact)
    assert torch.all(gradient == 0), "finite where nothing errs"


def test_unreadable_is_minus_log_of_one_minus_p() -> None:
    scores = torch.tensor([[1.0, 2.0, -1.0], [0.3, 0.1, 5.0]])
    labels = torch.tensor([1, 0])
    p = scores.softmax(1)[[0, 1], labels]
    assert float(unreadable(scores, labels)) == pytest.approx(float(-(1 - p).log().mean()), rel=1e-5)


def test_unreadable_ends_at_nothing_and_stays_finite_when_all_is_read() -> None:
    gone, whole = torch.tensor([[-200.0, 200.0]]), torch.tensor([[500.0, -500.0]])
    assert float(unreadable(gone, torch.tensor([0]))) == 0
    assert math.isfinite(float(unreadable(whole, torch.tensor([0]))))


def test_unreadable_pushes_the_label_down_and_nothing_else_lower() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    unreadable(scores, torch.tensor([0])).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad[0, 0] > 0
    assert (scores.grad[0, 1:] < 0).all()


def test_change_is_more_visible_on_flat_areas_than_in_texture() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((1, 1, 64, 64), 0.5)
    texture = flat + 0.2 * torch.randn(flat.shape, generator=generator)
    change = 0.02 * torch.randn(flat.shape, generator=generator)
    on_flat, on_texture = (float(visibility(p + change, p, p)) for p in (flat, texture))
    assert on_flat > 20 * on_texture
    assert float(visibility(flat, flat, flat)) == 0


def test_likeness_is_the_cosine_of_features() -> None:
    features = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert float(likeness(features, features * 2)) == pytest.approx(1)
    assert float(likeness(features, -features)) == pytest.approx(-1)


@pytest.mark.parametrize("period", [4, 16])
def test_repetition_sees_what_repeats_and_nothing_else(picture: torch.Tensor, period: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = 0.05 * torch.randn(period, period, generator=generator)
    pattern -= pattern.mean()
    free = 0.05 * torch.randn(picture.shape, generator=generator)
    woven = float(repetition(picture + pattern.repeat(336 // period, 448 // period), picture, period))
    assert woven == pytest.approx(float(pattern.square().mean()), rel=1e-3)
    assert float(repetition(picture + free, picture, period)) < 0.2 * float(free.square().mean())
    assert float(repetition(picture + 0.1, picture, period)) < 1e-9


@pytest.mark.parametrize("quality", [60, 75, 92])
def test_differentiable_jpeg_is_near_the_real_one(picture: torch.Tensor, quality: int) -> None:
    pixels = np.asarray((picture[0, 0] * 255).round(), np.uint8)
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
    assert decoded is not None
    real = torch.from_numpy(decoded.astype(np.float32)) / 255
    ours = jpeg(picture, quality)[0, 0]
    change, error = ((real - picture[0, 0]).square().mean().sqrt(), (ours - real).square().mean().sqrt())
    assert float(error) < 0.6 * float(change)


def test_jpeg_of_sides_that_are_no_multiple_of_eight() -> None:
    odd = torch.rand(2, 1, 13, 21, generator=torch.Generator().manual_seed(0))
    assert jpeg(odd, 90).shape == odd.shape
    assert float((jpeg(odd, 100) - odd).abs().max()) < 0.02


def test_blur_keeps_the_mean_and_takes_detail(picture: torch.Tensor) -> None:
    blurred = blur(picture, 1.5)
    assert float(blurred.mean()) == pytest.approx(float(picture.mean()), abs=2e-3)
    assert float(blurred.diff(dim=3).square().sum()) < 0.5 * float(picture.diff(dim=3).square().sum())


def test_notch_takes_what_repeats_with_the_blocks_and_leaves_the_rest(picture: torch.Tensor) -> None:
    pattern = 0.05 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    woven = picture + (pattern - pattern.mean()).repeat(21, 28)
    left = notch(woven, 16) - picture
    assert float(left.square().mean()) < 0.2 * float((woven - picture).square().mean())
    assert float((notch(picture, 16) - picture).abs().mean()) < 0.01


def test_every_way_has_a_gradient_and_is_drawn_from_the_generator(picture: torch.Tensor) -> None:
    small = picture[..., :64, :64]
    for seed in range(20):
        source = small.clone().requires_grad_(True)
        seen = random_way(source, 16, torch.Generator().manual_seed(seed))
        assert torch.equal(seen, random_way(source, 16, torch.Generator().manual_seed(seed)))
        seen.square().sum().backward()  # type: ignore[no-untyped-call]
        assert source.grad is not None
        assert torch.isfinite(source.grad).all()
        assert source.grad.abs().sum() > 0
    assert not torch.equal(noise(small, 0.1), noise(small, 0.1))


def test_median_is_opencvs_and_its_gradient_goes_to_the_median(picture: torch.Tensor) -> None:
    pixels = np.asarray((picture[0, 0] * 255).round(), np.uint8)
    seen = (median(torch.from_numpy(pixels)[None, None].float())[0, 0]).numpy()
    assert np.array_equal(seen, cv2.medianBlur(pixels, 3))
    small = torch.rand(1, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(median(small).sum(), small)
    assert float(gradient.sum()) == 64


def test_random_purifiers_keep_the_size_and_let_gradients_through() -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(2, 1, 32, 32, generator=generator)
    outcomes = set()
    for _ in range(40):
        seen = small.clone().requires_grad_(True)
        purified = random_purifier(seen, generator)
        assert purified.shape == small.shape
        (gradient,) = torch.autograd.grad(purified.square().sum(), seen)
        assert float(gradient.abs().sum()) > 0
        outcomes.add(round(float((purified.detach() - small).abs().mean()), 6))
    assert len(outcomes) > 20


@pytest.mark.parametrize("name", ["jpeg", "median", "noise", "notch", "blur"])
def test_purifiers_work_where_the_pictures_are(name: str) -> None:
    """On the meta device, which refuses to mix with the CPU as a GPU does."""
    pictures = torch.empty(2, 1, 32, 32, device="meta")
    purify: dict[str, Callable[[], torch.Tensor]] = {
        "jpeg": lambda: jpeg(pictures, 75),
        "median": lambda: median(pictures),
        "noise": lambda: noise(pictures, 0.1, torch.Generator()),
        "notch": lambda: notch(pictures, 8),
        "blur": lambda: blur(pictures, 0.7),
    }
    assert purify[name]().device.type == "meta"
