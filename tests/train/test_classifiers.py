"""Networks of small pictures: shapes, layers as published, and what a discriminator and a CSNet are made of."""

from collections.abc import Sequence

import cv2
import pytest
import torch
from torch import nn

from train import purifiers
from train.networks.classifiers import CLASSIFIERS, JUDGES, PAPER, SURROGATES
from train.networks.classifiers.classifier import Classifier
from train.networks.classifiers.reversible import reversible
from train.networks.csnet import CSNet, WireReconstruction, floor_rows
from train.networks.discriminator import Discriminator
from train.networks.refinement import Refinement
from train.networks.steps import WAYS, Steps
from train.networks.ways import Blur, Jpeg, Median, Way


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_answers_and_shows_what_it_sees_halfway(name: str) -> None:
    net = CLASSIFIERS[name]().eval()
    pictures = torch.rand(2, 1, 32, 32)
    middle, scores = net.halfway(pictures)
    assert scores.shape == (2, 10)
    assert torch.equal(net(pictures), scores)
    assert middle.shape[0] == 2
    assert middle.flatten(1).shape[1] > 500
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_no_judge_is_a_surrogate() -> None:
    assert not set(JUDGES) & (set(SURROGATES) | set(PAPER))
    assert len(JUDGES) >= 4


@pytest.mark.parametrize(("name", "layers"), [("vgg16", 14), ("resnet110", 110)])
def test_the_papers_classifiers_have_their_layers(name: str, layers: int) -> None:
    """VGG-16's CIFAR variant has one linear layer instead of three."""
    net = CLASSIFIERS[name]()
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules()) == layers


@pytest.mark.parametrize(("ratio", "rows"), [(0.1, 102), (0.2, 204), (0.3, 307)])
def test_csnet_measures_as_many_as_the_paper(ratio: float, rows: int) -> None:
    net = CSNet(floor_rows(ratio))
    assert net.sampling(torch.rand(2, 1, 32, 64)).shape == (2, rows, 1, 2)
    assert net(torch.rand(2, 1, 32, 64)).shape == (2, 1, 32, 64)
    assert net.sampling.bias is None


def test_discriminator_heads_share_all_but_their_last_layer() -> None:
    net = Discriminator()
    real, recognised = net(torch.rand(3, 1, 32, 32))
    assert real.shape == (3,)
    assert recognised.shape == (3, 10)
    kernels = [module.kernel_size for module in net.trunk.modules() if isinstance(module, nn.Conv2d)]
    assert kernels == [(5, 5)] * 3
    assert net.real.kernel_size == net.recognised.kernel_size == (5, 5)


def correct_something(refinement: Refinement) -> None:
    for parameter in refinement.deep.parameters():
        nn.init.normal_(parameter, std=0.1)


def test_what_a_camera_samples_gives_the_pictures_of_the_csnet() -> None:
    """Without rounding they are the same network: only the basis of the measurements differs."""
    torch.manual_seed(0)
    net = CSNet(20, block=8, channels=8)
    pictures = torch.randint(0, 256, (4, 1, 16, 24)).float()
    rows = net.span()
    steps = torch.full((20,), 0.5)
    measurements = torch.nn.functional.conv2d(pictures - 128, rows.float().reshape(20, 1, 8, 8), stride=8)
    served = WireReconstruction(net, rows, steps)(measurements / 0.5)
    assert torch.allclose(served, net(pictures / 255), atol=1e-5)
    turned = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q @ rows
    net.refinement = Refinement(turned, block=8, channels=8, blocks=1)
    correct_something(net.refinement)
    refined = WireReconstruction(net, rows, steps)(measurements / 0.5)
    assert torch.allclose(refined, net(pictures / 255), atol=1e-5), "whatever the basis"
    assert not torch.allclose(refined, served, atol=1e-2)


@torch.no_grad()
def test_rows_that_a_camera_left_out_are_not_agreed_with() -> None:
    """Fewer come as zeros, which would be mid-grey's; what layers found there stays."""
    torch.manual_seed(0)
    net = CSNet(20, block=8, channels=8)
    net.refinement = Refinement(net.span(), block=8, channels=8, blocks=1)
    correct_something(net.refinement)
    rows, steps = net.span(), torch.full((20,), 0.5)
    served = WireReconstruction(net, rows, steps)
    pictures = torch.randint(0, 256, (2, 1, 16, 24)).float()
    levels = (torch.nn.functional.conv2d(pictures - 128, rows.float().reshape(20, 1, 8, 8), stride=8) / 0.5).round()
    levels[:, 12:] = 0
    shown = torch.nn.functional.conv2d(served(levels) * 255 - 128, rows.float().reshape(20, 1, 8, 8), stride=8) / 0.5
    assert torch.allclose(shown[:, :12], levels[:, :12], atol=0.01)
    assert (shown[:, 12:].abs().amax((0, 2, 3)) > 1).all()
    levels[:, 5] = 0
    shown = torch.nn.functional.conv2d(served(levels) * 255 - 128, rows.float().reshape(20, 1, 8, 8), stride=8) / 0.5
    assert shown[:, 5].abs().max() < 0.01, "a level of zero among others is what was measured"


@torch.no_grad()
def test_what_is_measured_of_a_refined_picture_is_what_was_measured() -> None:
    torch.manual_seed(0)
    net = CSNet(20, block=8, channels=8)
    pictures = torch.rand(4, 1, 16, 24)
    plain = net(pictures)
    net.refinement = Refinement(net.span(), block=8, channels=8, blocks=1)
    nearest = net.refinement.agreeing(plain, net.refinement.measured_of(pictures))
    assert torch.allclose(net(pictures), nearest, atol=1e-5), "at first nothing more is corrected"
    correct_something(net.refinement)
    refined = net(pictures)
    for made in (refined, nearest):
        assert torch.allclose(net.sampling(made), net.sampling(pictures), atol=1e-5)
    assert (nearest - pictures).square().sum() < (plain - pictures).square().sum(), "nearer to any picture so measured"
    assert not torch.allclose(refined, nearest, atol=1e-3), "what wasn't measured is corrected"


@pytest.mark.parametrize(
    "name", ["convnet8", "resnet14", "inception", "convmixer", "convmixer_ln", "vgg16", "resnet110"]
)
def test_the_way_back_that_is_written_out_is_the_gradient(name: str) -> None:
    torch.manual_seed(0)
    net = CLASSIFIERS[name]().double()  # where no two values in a pool are equal
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    net.train()(torch.rand(16, 1, 32, 32).double())  # statistics of its own, so that normalisation counts
    net.eval()
    pictures, wanted = torch.rand(3, 1, 32, 64).double().requires_grad_(), torch.randn(3, 10).double()
    scores = net(pictures)
    (expected,) = torch.autograd.grad(scores, pictures, wanted)
    answered, back = reversible(net, pictures.detach())
    assert torch.allclose(answered, scores, atol=1e-8)
    found = back(wanted)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("way", [Blur(0.7), Median()], ids=["blur", "median"])
def test_the_way_back_through_a_purifier_is_the_gradient(way: Way) -> None:
    pictures, wanted = torch.rand(2, 1, 16, 24, requires_grad=True), torch.randn(2, 1, 16, 24)
    seen = way(pictures)
    (expected,) = torch.autograd.grad(seen, pictures, wanted)
    found = way.reversible(pictures.detach())[1](wanted)
    assert torch.allclose(found, expected, atol=1e-5)
    settled = pictures.detach()[..., 4:-4, 4:-4]
    twin = purifiers.median(pictures.detach()) if isinstance(way, Median) else purifiers.blur(pictures.detach(), 0.7)
    assert not torch.allclose(seen[..., 4:-4, 4:-4], settled, atol=1e-2)
    assert torch.allclose(seen[..., 4:-4, 4:-4], twin[..., 4:-4, 4:-4], atol=1e-5)


def test_jpeg_on_the_way_is_jpeg_and_its_way_back_that_of_the_differentiable_one() -> None:
    pixels = torch.randint(60, 200, (2, 1, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures, wanted = (pixels.float() / 255).requires_grad_(), torch.randn(2, 1, 16, 24)
    (expected,) = torch.autograd.grad(purifiers.jpeg(pictures, 75), pictures, wanted)
    seen, back = Jpeg(75).reversible(pictures.detach())
    assert torch.allclose(back(wanted), expected, atol=1e-4)
    for ours, picture in zip(seen[:, 0], pixels[:, 0].numpy(), strict=True):
        _, coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 75])
        theirs = torch.from_numpy(cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE)).float()
        changed = (theirs - torch.from_numpy(picture)).abs().mean()
        assert (255 * ours - theirs).abs().mean() < 0.3 * changed


def stepping(guide: Classifier, size: float = 0.1, through: Sequence[str] = tuple(WAYS)) -> Steps:
    torch.manual_seed(1)
    steps = Steps(guide, [CLASSIFIERS["convnet8"]().eval()], 5, through)
    steps.size.fill_(size)
    return steps.eval()


class Certain(Classifier):
    """Always of one class."""

    def __init__(self, answer: int) -> None:
        super().__init__(nn.Identity(), nn.Identity())
        self.answer = answer

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return 20 * nn.functional.one_hot(torch.full((len(pictures),), self.answer), 10).float()


@torch.no_grad()
def test_steps_go_as_far_as_a_picture_has_detail_and_from_what_the_guide_believes() -> None:
    torch.manual_seed(0)
    busy = torch.rand(3, 1, 32, 32)
    pictures = torch.cat([busy, 0.5 + 0.1 * (busy - 0.5), torch.full((1, 1, 32, 32), 0.3)])
    reader = stepping(Certain(0)).readers[0]
    for answer in (0, 7):
        steps = stepping(Certain(answer))
        moved = steps(pictures)
        change = (moved - pictures).square().mean((1, 2, 3)).sqrt()
        detail = nn.functional.conv2d(pictures, steps.laplacian).square().mean((1, 2, 3)).sqrt()
        assert torch.allclose(change, 0.1 * detail, atol=1e-5)
        assert torch.equal(moved[-1], pictures[-1]), "a flat picture stays as it is"
        before, after = (reader(each).softmax(1)[:3, answer] for each in (pictures, moved))
        assert (after < before).all(), "the reader takes it less for what the guide believes"
    assert not torch.allclose(stepping(Certain(0))(busy), stepping(Certain(7))(busy), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("way", ["jpeg", "blur", "median"])
def test_steps_are_by_what_readers_look_through(way: str) -> None:
    busy = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    looked = stepping(Certain(0), through=(way,))(busy)
    assert not torch.allclose(looked, stepping(Certain(0), through=("as is",))(busy), atol=1e-3)
    assert not torch.allclose(looked, stepping(Certain(0), through=("as is", way))(busy), atol=1e-3)
