"""How strong a veil is, chosen after it was trained: on the line from the plain weights through the veiled ones.

Between a network and one that was tuned from it, and for a way beyond, what they make changes smoothly with their
weights (Wortsman et al. 2022). A stronger veil is read less and costs more PSNR, the more the stronger it is already.
Of a veil that learned for long that is so only near what it learned: weaker ones may cost more, ``train.loops.price``.
"""

import torch
from torch import nn

WEAKEST, STRONGEST = 0.5, 1.5
"""Of what was trained: one to be served is no plain picture by another name, and none beyond what was looked at."""


@torch.no_grad()
def set_strength(net: nn.Module, plain: nn.Module, veiled: nn.Module, strength: float) -> None:
    """Set a network's weights to the plain (0) or the veiled ones (1), or elsewhere on their line; all of one shape."""
    for weight, before, after in zip(net.parameters(), plain.parameters(), veiled.parameters(), strict=True):
        weight.copy_(torch.lerp(before, after, strength))
