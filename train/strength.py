"""How strong a veil is, chosen after it was trained: on the line from the plain weights through the veiled ones.

Between a network and one that was tuned from it, what they make changes evenly with their weights (Wortsman et al.
2022); so do the PSNR that a veil costs and what readers lose, for a way beyond the veiled weights too.
"""

import torch
from torch import nn

STRONGEST = 1.5
"""Nothing is known of what lies far beyond what was trained."""


@torch.no_grad()
def set_strength(net: nn.Module, plain: nn.Module, veiled: nn.Module, strength: float) -> None:
    """Set a network's weights to the plain (0) or the veiled ones (1), or elsewhere on their line; all of one shape."""
    for weight, before, after in zip(net.parameters(), plain.parameters(), veiled.parameters(), strict=True):
        weight.copy_(torch.lerp(before, after, strength))
