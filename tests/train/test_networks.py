from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from encoder.sampling import Operator
from train.data.files import DataError
from train.data.photographs import Photographs
from train.export import operator_of
from train.networks.phi import covariance, energy, principal_rows
from train.networks.quarter import QuarterCSNet


@pytest.fixture(scope="module")
def pictures(photographs: list[NDArray[np.uint8]]) -> list[torch.Tensor]:
    return [torch.from_numpy(picture) for picture in photographs]


@pytest.fixture(scope="module")
def net(pictures: list[torch.Tensor]) -> QuarterCSNet:
    return QuarterCSNet(principal_rows(covariance(pictures, 16), 12), channels=8, blocks=1).eval()


def test_principal_rows_are_orthonormal_and_hold_the_most_energy(pictures: list[torch.Tensor]) -> None:
    moment = covariance(pictures, 8)
    rows = principal_rows(moment, 10)
    assert torch.allclose(rows @ rows.T, torch.eye(10), atol=1e-5)
    kept = energy(rows, moment)
    assert (kept.diff() <= 1e-6).all()
    other = torch.linalg.qr(torch.randn(64, 10, generator=torch.Generator().manual_seed(0))).Q.T
    assert kept.sum() > energy(other, moment).sum()


def test_rows_beside_known_ones_are_orthogonal_to_them(pictures: list[torch.Tensor]) -> None:
    moment = covariance(pictures, 8)
    known = torch.nn.functional.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    assert (principal_rows(moment, 5, known) @ known.T).abs().max() < 1e-4


def test_training_and_camera_sample_and_quantise_alike(net: QuarterCSNet, photographs: list[NDArray[np.uint8]]) -> None:
    operator: Operator = operator_of(net)
    picture = photographs[0]
    ours = operator.quantise(operator.sample(picture, 12), (21, 28))
    theirs = net.sampling(torch.from_numpy(picture)[None, None].float() / 255)[0].detach().numpy()
    assert np.abs(ours - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.999


def test_rounding_passes_its_gradient_to_phi(net: QuarterCSNet) -> None:
    picture = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    measured = net.sampling(picture)
    assert torch.equal(measured, measured.round())
    measured.square().sum().backward()
    assert net.sampling.tail.grad is not None
    assert net.sampling.tail.grad.abs().sum() > 0


def test_frozen_rows_get_no_gradient(net: QuarterCSNet) -> None:
    frozen = QuarterCSNet(net.sampling.phi().detach(), frozen_rows=5, channels=8, blocks=1)
    assert frozen.sampling.tail.shape == (7, 256)
    assert not frozen.sampling.head.requires_grad
    assert torch.allclose(frozen.sampling.phi()[:5], net.sampling.phi()[:5])


def test_the_initial_reconstruction_starts_as_the_transpose_of_phi(net: QuarterCSNet) -> None:
    """With orthonormal rows the transpose is the projection: the best linear estimate from the rows alone."""
    g = net.reconstructor
    measured = torch.eye(12).reshape(12, 12, 1, 1)
    expected = (net.sampling.phi() * net.sampling.steps()[:, None] / 255).reshape(12, 1, 16, 16)
    initial = torch.nn.functional.pixel_shuffle(g.initial(measured * g.steps / 255), 16)
    assert torch.allclose(initial, expected, atol=1e-5)


def test_ordering_rows_changes_their_order_and_no_picture(net: QuarterCSNet, pictures: list[torch.Tensor]) -> None:
    shuffled = QuarterCSNet(net.sampling.phi().detach().flip(0), channels=8, blocks=1).eval()
    picture = pictures[0][None, None].float() / 255
    moment = covariance(pictures, 16)
    with torch.no_grad():
        before = shuffled(picture)
        shuffled.order_rows(moment)
        after = shuffled(picture)
    assert torch.allclose(before, after, atol=1e-4)
    assert (energy(shuffled.sampling.phi(), moment).diff() <= 0).all()


def test_photographs_are_drawn_alike_from_alike_generators(folder: Path) -> None:
    first, second = (Photographs([folder], torch.Generator().manual_seed(5)) for _ in range(2))
    batch = first.batch(4, 64)
    assert batch.shape == (4, 1, 64, 64)
    assert 0 <= batch.min() < batch.max() <= 1
    assert torch.equal(batch, second.batch(4, 64))
    assert not torch.equal(batch, second.batch(4, 64))
    with pytest.raises(DataError, match="no picture is 500 pixels high and wide"):
        first.batch(1, 500)


def test_views_are_most_of_a_picture_at_any_size(folder: Path) -> None:
    data = Photographs([folder], torch.Generator().manual_seed(5))
    data.pictures = [torch.arange(100, dtype=torch.uint8).repeat(80, 1)]
    for side in (64, 96):
        views = data.views(3, side) * 255
        assert views.shape == (3, 1, side, side)
        spans = views.amax((1, 2, 3)) - views.amin((1, 2, 3))
        assert ((spans > 55) & (spans < 84)).all()
