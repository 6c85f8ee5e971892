"""Laws of the paper's objectives: values by hand, signs, and gradients checked numerically."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from train.objectives import paper
from train.objectives.veil import uniform

DRAW = torch.Generator().manual_seed(0)
X = torch.rand(3, 1, 4, 4, generator=DRAW, dtype=torch.float64)
SCORES = torch.randn(3, 10, generator=DRAW, dtype=torch.float64)
LABEL = torch.tensor([1, 5, 9])
READ = torch.randn(16, 10, generator=DRAW, dtype=torch.float64)
REAL = torch.randn(16, generator=DRAW, dtype=torch.float64)


def total(terms: paper.Terms) -> torch.Tensor:
    return sum(terms.values(), torch.zeros((), dtype=torch.float64))


def test_reconstruction_is_half_the_squared_distance_per_picture() -> None:
    assert float(paper.reconstruction_loss(X + 0.5, X)) == pytest.approx(0.5 * 16 * 0.25)


def adversarial(reconstruction: torch.Tensor) -> torch.Tensor:
    return total(
        paper.against_classifier(reconstruction, X, reconstruction.flatten(1) @ READ, LABEL, alpha=0.7, beta=1.3)
    )


def generative(reconstruction: torch.Tensor) -> torch.Tensor:
    seen = reconstruction.flatten(1)
    return total(
        paper.against_discriminator(
            reconstruction, X, seen @ REAL, seen @ READ, LABEL, alpha=0.7, lambda_g=1.1, gamma_g=0.1
        )
    )


@pytest.mark.parametrize("objective", [adversarial, generative])
def test_gradients_are_those_of_finite_differences(objective: Callable[[torch.Tensor], torch.Tensor]) -> None:
    start = (X + 0.1 * torch.randn(X.shape, generator=DRAW, dtype=torch.float64)).requires_grad_(True)
    assert torch.autograd.gradcheck(objective, (start,))


def test_equation_4_falls_when_the_classifier_errs_and_rises_with_distance() -> None:
    sure = 20.0 * functional.one_hot(LABEL, 10).double()
    right = paper.against_classifier(X, X, sure, LABEL, alpha=1.0, beta=1.0)
    wrong = paper.against_classifier(X, X, -sure, LABEL, alpha=1.0, beta=1.0)
    assert float(right["reconstruction"]) == 0
    assert float(wrong["classifier"]) < float(right["classifier"]) - 15
    assert float(paper.against_classifier(X + 1, X, sure, LABEL, alpha=1.0, beta=1.0)["reconstruction"]) > 0
    doubled = paper.against_classifier(X + 1, X, SCORES, LABEL, alpha=2.0, beta=3.0)
    single = paper.against_classifier(X + 1, X, SCORES, LABEL, alpha=1.0, beta=1.0)
    assert float(doubled["reconstruction"]) == pytest.approx(2 * float(single["reconstruction"]))
    assert float(doubled["classifier"]) == pytest.approx(3 * float(single["classifier"]))


def test_the_terms_of_equation_10_have_its_signs() -> None:
    def terms(real: float, read: float) -> paper.Terms:
        scores = read * functional.one_hot(LABEL, 10).double()
        return paper.against_discriminator(
            X, X, torch.full((3,), real), scores, LABEL, alpha=1.0, lambda_g=1.0, gamma_g=0.1
        )

    assert float(terms(5.0, 0.0)["G_rf"]) < float(terms(-5.0, 0.0)["G_rf"])
    assert float(terms(0.0, -5.0)["G_rec"]) < float(terms(0.0, 5.0)["G_rec"])
    assert float(terms(0.0, 0.0)["G_rec"]) == pytest.approx(-0.1 * math.log(10))
    assert float(terms(0.0, 0.0)["G_rf"]) == pytest.approx(math.log(2))


def test_the_discriminator_learns_what_is_real_and_which_class() -> None:
    real, made = torch.full((4,), 3.0), torch.full((4,), -3.0)
    told = float(paper.discriminator_of_real(real, made, 1.0)["D_rf"])
    mistaken = float(paper.discriminator_of_real(made, real, 1.0)["D_rf"])
    assert told == pytest.approx(2 * math.log(1 + math.exp(-3)), rel=1e-5)
    assert mistaken > told + 5
    assert float(paper.discriminator_of_class(SCORES, LABEL, 0.0)["D_rec"]) == 0
    whole = float(functional.cross_entropy(SCORES, LABEL))
    assert float(paper.discriminator_of_class(SCORES, LABEL, 0.5)["D_rec"]) == pytest.approx(whole / 2)


def test_beta_of_mnist_is_one_until_less_than_a_tenth_is_read() -> None:
    due = [paper.beta_due(1.0, 0.1, 0.1, lowest) for lowest in (1.0, 0.5, 0.1, 0.0999, 0.02)]
    assert due == [1.0, 1.0, 1.0, 0.1, 0.1]
    assert paper.beta_due(1.0, 1.0, 0.0, 0.0) == 1.0


def test_uniform_is_least_for_an_answer_that_says_nothing() -> None:
    assert float(uniform(torch.zeros(2, 10))) == pytest.approx(0.0, abs=1e-6)
    sure = 8.0 * functional.one_hot(LABEL, 10).float()
    assert float(uniform(sure)) > float(uniform(sure / 4)) > 0.01
    scores = SCORES.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(uniform, (scores,))
