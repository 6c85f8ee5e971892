"""What a veil may cost, in PSNR: when, how strongly it is held to that, and how strong it is made in the end."""

import copy
from functools import cache

import torch
from torch import Tensor

from train.data.small import Pictures
from train.devices import Device
from train.evaluation.small import mean_psnr
from train.models import pictures_of
from train.networks.csnet import CSNet
from train.settings import EnsembleRun
from train.strength import STRONGEST, set_strength

_LANDED_ON = 2000
_STEP, _FINEST = 0.02, 0.002


class FidelityWeight:
    """α of (4), moved so that the veil costs the share of PSNR that it may: up when it costs more, down when less.

    Args:
        device: where the veil is trained.
        moves: by how much in an iteration, at most, as a part of itself.
    """

    def __init__(self, device: Device, moves: float) -> None:
        self._moves = moves
        self.alpha = torch.ones((), device=device.torch)

    def follow(self, lost: Tensor, allowed: float) -> None:
        """Move for a batch that lost some share of its PSNR, of which it may lose another; most from twice that on."""
        error = ((lost - allowed) / max(allowed, 1e-3)).clamp(-1, 1)
        self.alpha = (self.alpha * (1 + self._moves * error)).clamp(1e-3, 1e4)

    def state_dict(self) -> dict[str, float]:
        return {"alpha": float(self.alpha)}

    def load_state_dict(self, state: dict[str, float], /) -> None:
        self.alpha = torch.full_like(self.alpha, state["alpha"])


def allowed(iteration: int, run: EnsembleRun) -> float:
    """The share of the PSNR that may be lost at an iteration."""
    left = max(0.0, 1 - iteration / (run.price_falls * run.iterations))
    return run.psnr_lost + (run.psnr_lost_at_first - run.psnr_lost) * left


def landed(net: CSNet, base: CSNet, pictures: Pictures, lost: float, device: Device) -> tuple[float, float]:
    """Make a veil weaker or stronger until it costs what it may, and return by what factor, and what it costs then.

    A stronger one is read less, ``train.strength``. Looked for outward from the veil as it was trained, and no further
    than where a weaker one would cost more: between the weights of a CSNet and those that a long run ended in lie
    dearer ones (a veil of r = 0.2 cost 1 % after 10,000 iterations, 2.9 % when made half as strong). Then it stays
    where it costs least.

    Args:
        net: whose G was veiled; changed.
        base: the CSNet that it started from.
        pictures: of training; the first 2,000 are looked at.
        lost: share of the CSNet's mean PSNR that the veil may cost.
        device: to look on.

    Returns:
        The factor, at most ``STRONGEST`` whatever the price, and the share of the PSNR that is lost.
    """
    looked_at = pictures[:_LANDED_ON]
    # Not with ``net`` itself: on a GPU what was recorded of it takes batches of one size.
    tried = copy.deepcopy(base)
    plain = mean_psnr(pictures_of(base, looked_at, device), looked_at)

    @cache
    def cost(strength: float) -> float:
        set_strength(tried.reconstruction, base.reconstruction, net.reconstruction, strength)
        return 1 - mean_psnr(pictures_of(tried, looked_at, device), looked_at) / plain

    strength, step = 1.0, _STEP
    # A veil that costs far less than it may is far from as strong as it may be made: each step is twice the last.
    while strength + step <= STRONGEST and max(cost(strength), cost(strength + step)) <= lost:
        strength, step = strength + step, 2 * step
    while step > _FINEST:
        if cost(strength) > lost and cost(strength - step) < cost(strength):
            strength -= step
        elif strength + step <= STRONGEST and cost(strength + step) <= lost:
            strength += step
        else:
            step /= 2
    costs = cost(strength)
    set_strength(tried.reconstruction, base.reconstruction, net.reconstruction, strength)
    net.load_state_dict(tried.state_dict())
    return strength, costs
