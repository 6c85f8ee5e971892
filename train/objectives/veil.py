"""What a veil is trained for: readers lose the label, and eyes don't see the change."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from train.purifiers import blur

_SEEN_CONTRAST = 2.0 / 255
"""Change that eyes just see on a flat area; contrast below it hides nothing."""
_WINDOW = 40


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


def uniform(scores: Tensor) -> Tensor:
    """Divergence of a reader's answer from "any class, equally likely", mean over pictures: KL(uniform ‖ answer), ≥ 0.

    Unbounded ascent on the label's cross-entropy makes confident wrong answers, which can be told apart and mapped
    back; an answer that says nothing can't.

    Args:
        scores: (N, K) logits.
    """
    return -functional.log_softmax(scores, 1).mean() - math.log(scores.shape[1])


def likeness(seen: Tensor, original: Tensor) -> Tensor:
    """Cosine of a reader's features of the veiled and of the original picture, mean over pictures: 1 is the same.

    Taken halfway through a reader, where readers of different families are more alike than in their answers, so that
    what is learned against one works against another.

    Args:
        seen: (N, …) features of the veiled pictures.
        original: (N, …) features of the originals.
    """
    return functional.cosine_similarity(seen.flatten(1), original.flatten(1)).mean()


def repetition(veiled: Tensor, plain: Tensor, period: int) -> Tensor:
    """Mean square of the part of the veil that repeats with a period, in windows of some 40 pixels.

    The cheapest veil is a plaid with the period of the blocks, or of the four pixels that one deep feature stands for:
    it looks like woven cloth, and a reader that knows the period takes it away again (``train.purifiers.notch``).
    What follows the picture instead averages out here.
    """
    height, width = (side // period * period for side in veiled.shape[-2:])
    phases = functional.pixel_unshuffle((veiled - plain)[..., :height, :width], period)
    phases = phases - phases.mean(1, keepdim=True)
    window = max(3, round(_WINDOW / period))
    return functional.avg_pool2d(phases, window, stride=max(1, window // 2)).square().mean()


def visibility(veiled: Tensor, plain: Tensor, original: Tensor) -> Tensor:
    """Energy of the veil over the contrast that hides it, mean over pixels: 1 is a change as strong as its mask.

    Contrast is the local deviation of the original (Gaussian window, σ 3 pixels); on flat areas what counts is
    ``_SEEN_CONTRAST``. All pictures (N, 1, H, W) in [0, 1].
    """
    mean = blur(original, 3.0)
    variance = (blur(original.square(), 3.0) - mean.square()).clamp_min(0)
    return (blur((veiled - plain).square(), 1.0) / (variance + _SEEN_CONTRAST**2)).mean()
