"""What holds Adv-CSNet-E's veil to its price, and its readers: which count, and which learn."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train.schedules import CPU, CSNET
from train.data.small import SmallSet
from train.evaluation.small import mean_psnr
from train.loops.csnet import train
from train.loops.ensemble import LearningReaders, Needs
from train.loops.price import FidelityWeight, landed
from train.models import csnet_of, pictures_of
from train.networks.classifiers.classifier import Classifier


@pytest.fixture(scope="module")
def csnet(data: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished CSNet's checkpoint, of which some came of learning."""
    torch.set_num_threads(1)
    longer = replace(CSNET, iterations=16, learning_rate=3e-4)
    return train(longer, data, CPU, tmp_path_factory.mktemp("csnet"), lambda row: None)


def test_the_weight_of_fidelity_follows_what_is_lost() -> None:
    weight = FidelityWeight(CPU, 0.05)
    weight.follow(torch.tensor(0.02), 0.01)
    up = float(weight.alpha)
    assert up > 1.0
    weight.follow(torch.tensor(0.01), 0.01)
    assert float(weight.alpha) == pytest.approx(up)
    weight.follow(torch.tensor(0.0), 0.01)
    assert float(weight.alpha) < up
    for _ in range(1000):
        weight.follow(torch.tensor(1.0), 0.01)
    assert float(weight.alpha) <= 1e4


@pytest.mark.parametrize("price", [0.01, 0.05])
def test_a_veil_lands_at_its_price(price: float, data: SmallSet, csnet: Path) -> None:
    base = csnet_of(csnet, CPU)
    net = csnet_of(csnet, CPU)
    torch.manual_seed(3)
    for weights in net.reconstruction.parameters():
        weights.add_(0.3 * weights.abs().mean() * torch.randn(weights.shape))
    pictures = data.train[:30]

    def lost() -> float:
        """Share of the PSNR that the change of G costs."""
        of_net, of_base = (mean_psnr(pictures_of(model, pictures, CPU), pictures) for model in (net, base))
        return 1 - of_net / of_base

    assert lost() > 0.1
    factor, costs = landed(net, base, pictures, price, CPU)
    assert factor < 1
    assert price * 0.95 < costs <= price
    assert lost() == pytest.approx(costs)
    strongest, _ = landed(net, base, pictures, 0.9, CPU)
    assert strongest == pytest.approx(1.5, abs=0.01), "no stronger than that, at any price"
    assert torch.equal(net.sampling.weight, base.sampling.weight)


def test_a_veil_lands_beside_what_was_trained_where_weaker_ones_cost_more(data: SmallSet, csnet: Path) -> None:
    base = csnet_of(csnet, CPU)
    for name, weights in base.reconstruction.deep.named_parameters():
        weights.mul_(2 if name.endswith("weight") else 1)  # as far from no change as what has learned
    net = copy.deepcopy(base)
    first, bias, second, *_ = net.reconstruction.deep.parameters()
    first.copy_(first.flip(0))  # the same pictures by features in another order
    bias.copy_(bias.flip(0))
    second.copy_(second.flip(1))
    factor, costs = landed(net, base, data.train[:50], 1e-3, CPU)
    assert factor == pytest.approx(1, abs=0.05)
    assert costs < 1e-3
    bias.add_(0.02)
    factor, costs = landed(net, base, data.train[:50], 1e-3, CPU)
    assert 0.95 < factor < 1, "made weaker as long as that makes it cheaper"
    assert costs < 1e-3


def test_a_reader_counts_by_what_it_still_reads() -> None:
    needs = Needs(CPU)
    assert [float(share) for share in needs.shares(["new", "other"]).values()] == [0.5, 0.5]
    for _ in range(50):
        for name, read in (("fooled", 0.1), ("lower", 0.0), ("reading", 0.5)):
            needs.note(name, torch.tensor(read))
    shares = needs.shares(["fooled", "reading", "lower"])
    assert float(sum(shares.values())) == pytest.approx(1)
    assert float(shares["reading"]) > 0.8
    assert float(shares["fooled"]) == pytest.approx(float(shares["lower"])), "below chance there is nothing to win"
    assert float(shares["fooled"]) > 0, "one that isn't watched comes back"


def test_learning_readers_start_from_every_surrogate_in_turn_and_the_last_are_kept() -> None:
    surrogates = {str(number): Classifier(nn.Identity(), nn.Linear(1, 1)) for number in range(3)}
    for number, surrogate in enumerate(surrogates.values()):
        nn.init.constant_(surrogate.second.weight, number)  # type: ignore[arg-type]
    readers = LearningReaders(surrogates, count=2, kept=1)

    def started(name: str) -> float:
        return float(readers.readers()[name].second.state_dict()["weight"])

    assert list(readers.readers()) == ["started_0", "started_1"]
    assert (started("started_0"), started("started_1")) == (0, 1)
    seen = []
    for _ in range(4):
        readers.restart_one()
        _, newest, kept = readers.readers()
        seen.append((started(newest), started(kept)))
    assert seen == [(2, 0), (0, 1), (1, 2), (2, 0)]
    assert list(readers.readers()) == ["started_4", "started_5", "started_3"], "a name stays with its reader"
