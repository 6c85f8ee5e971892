"""The paper's objectives, equations (4) to (12). Each gives its terms by name, weighted, to be added and logged."""

import torch
from torch import Tensor
from torch.nn import functional

Terms = dict[str, Tensor]


def reconstruction_loss(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """L_G of equation (5): 1/(2B) Σ d, d the squared Euclidean distance, B the number of pictures."""
    return (reconstruction - picture).square().sum() / (2 * len(picture))


def against_classifier(
    reconstruction: Tensor, picture: Tensor, scores: Tensor, label: Tensor, *, alpha: float, beta: float
) -> Terms:
    """What G minimises against one frozen classifier, equations (4) and (6): α·L_G − β·L_C.

    Args:
        reconstruction: x' = G(s), (N, 1, H, W).
        picture: x.
        scores: C(x'), (N, K): logits, or what the cross-entropy is to take for them.
        label: Y, (N,).
    """
    return {
        "reconstruction": alpha * reconstruction_loss(reconstruction, picture),
        "classifier": -beta * functional.cross_entropy(scores, label),
    }


def discriminator_of_real(real: Tensor, reconstructed: Tensor, lambda_d: float) -> Terms:
    """What D_rf minimises, the first part of (7): λ_D·L_D-Drf, with (8) 1/B Σ (ce(D_rf(x), 1) + ce(D_rf(x'), 0)).

    Equation (8) prints D_rf(s); D looks at pictures, so x' is meant. Both logits are (N,), x' detached from G.
    """
    return {"D_rf": lambda_d * (_called(real, 1.0) + _called(reconstructed, 0.0))}


def discriminator_of_class(scores: Tensor, label: Tensor, gamma_d: float) -> Terms:
    """What D_rec minimises, the second part of (7): γ_D·L_D-Drec, with (9) 1/B Σ ce(D_rec(x), Y), of originals."""
    return {"D_rec": gamma_d * functional.cross_entropy(scores, label)}


def against_discriminator(
    reconstruction: Tensor,
    picture: Tensor,
    real: Tensor,
    scores: Tensor,
    label: Tensor,
    *,
    alpha: float,
    lambda_g: float,
    gamma_g: float,
) -> Terms:
    """What G minimises in the generative model, (10): α·L_G + λ_G·L_G-Drf − γ_G·L_G-Drec.

    Args:
        real: D_rf(x'), logits (N,), of (11): 1/B Σ ce(D_rf(x'), 1).
        scores: D_rec(x'), logits (N, K), of (12): 1/B Σ ce(D_rec(x'), Y).
    """
    return {
        "reconstruction": alpha * reconstruction_loss(reconstruction, picture),
        "G_rf": lambda_g * _called(real, 1.0),
        "G_rec": -gamma_g * functional.cross_entropy(scores, label),
    }


def beta_due(beta: float, beta_later: float, read_below: float, lowest: float) -> float:
    """β of (4): the paper's MNIST runs start with 1 and go on with 0.1 once training accuracy fell under 0.1.

    Args:
        lowest: the lowest accuracy so far, of a whole pass through the training pictures; 1 at first.
    """
    return beta_later if lowest < read_below else beta


def _called(logits: Tensor, answer: float) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, answer))
