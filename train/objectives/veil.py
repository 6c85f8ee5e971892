"""What a veil is trained for: readers lose the label, and eyes don't see the change."""

import torch
from torch import Tensor
from torch.nn import functional

from train.purifiers import blur

_SEEN_CONTRAST = 3.0 / 255
"""Change that eyes just see on a flat area; contrast below it hides nothing."""


def unreadable(scores: Tensor, labels: Tensor) -> Tensor:
    """−log(1 − p(label)), mean over pictures.

    Stands for −L_C of equation (4). That one has no bound, so a single picture read confidently wrong can outweigh the
    reconstruction of all others; this one ends at 0, when nothing of the label is left.

    Args:
        scores: (N, K) logits.
        labels: (N,) what must not be read.
    """
    others = scores.masked_fill(functional.one_hot(labels, scores.shape[1]).bool(), float("-inf"))
    return (torch.logsumexp(scores, 1) - torch.logsumexp(others, 1)).mean()


def visibility(veiled: Tensor, plain: Tensor, original: Tensor) -> Tensor:
    """Energy of the veil over the contrast that hides it, mean over pixels: 1 is a change as strong as its mask.

    Contrast is the local deviation of the original (Gaussian window of 3 pixels); on flat areas what counts is
    ``_SEEN_CONTRAST``. All pictures (N, 1, H, W) in [0, 1].
    """
    mean = blur(original, 3.0)
    variance = (blur(original.square(), 3.0) - mean.square()).clamp_min(0)
    return (blur((veiled - plain).square(), 1.0) / (variance + _SEEN_CONTRAST**2)).mean()
