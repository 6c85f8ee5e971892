"""Steps that a decoder takes along the gradients of readers that it carries, as layers of a network.

x ─┬▶ guide ─▶ what it may be ─┐
   ├▶ how much detail it has ──┤
   └▶ + ─▶ ways ─▶ readers ─▶ back through both ─▶ step to where readers are wrong ─▶ x, again
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.networks.classifiers.classifier import Classifier
from train.networks.classifiers.reversible import reversible
from train.networks.ways import Blur, Jpeg, Median

_TINY = 1e-20
"""Of a mean square: a picture whose gradient is zero stays as it is."""
_TOGETHER = 1.5
"""Steps together are longer than the way may be, so that later ones can still turn it."""
WAYS: Mapping[str, Callable[[], nn.Module]] = {
    "as is": nn.Sequential,
    "jpeg": partial(Jpeg, 75),
    "blur": partial(Blur, 0.7),
    "median": Median,
}
"""What readers look through, by name."""
_SURE = 1e-6
"""No class is ruled out, or certain, to the guide."""


class Steps(nn.Module):
    """Pictures (N, 1, H, W), about [0, 1] → the same, moved a little way to where readers are wrong.

    Which classes are right the guide believes by posteriors q, where readers that know such pictures less well would
    take a wrong class for the right one and step towards that. A reader's answers p are right by Σ p·q. Each step goes
    along the sum of the readers' gradients of log Σ p·(1 − q) − log Σ p·q, of one length each (Kurakin et al. 2017, in
    the L2 norm; there q is one label). From step to step each reader looks through another way, in turn (Athalye et
    al. 2018, expectation over transformations).

    The way from a picture stays no longer than ``size`` of its detail, the root mean square of its Laplacian: where
    there is more of it a reconstruction errs more, and the same way costs less PSNR and shows less.

    Args:
        guide: a classifier, in evaluation mode, as it stays.
        readers: classifiers of layers that ``reversible`` knows, likewise.
        count: of steps.
        through: names of ``WAYS``, in turn.
    """

    size: Tensor
    """Root mean square of the change, as a part of that of the picture's Laplacian."""
    laplacian: Tensor

    def __init__(self, guide: Classifier, readers: Sequence[Classifier], count: int, through: Sequence[str]) -> None:
        super().__init__()
        self.guide, self.readers, self.count = guide, nn.ModuleList(readers), count
        self.ways = nn.ModuleList([WAYS[name]() for name in through])
        self.register_buffer("size", torch.tensor(0.0))
        kernel = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])
        self.register_buffer("laplacian", kernel.reshape(1, 1, 3, 3), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        believed = functional.softmax(self.guide(pictures), 1).clamp(_SURE, 1 - _SURE)
        right, wrong = believed.log(), (1 - believed).log()
        reach = self.size * _length(functional.conv2d(pictures, self.laplacian))
        change = torch.zeros_like(pictures)
        for number in range(self.count):
            gradients, moved = [], pictures + change
            for place, reader in enumerate(self.readers):
                way = self.ways[(number + place) % len(self.ways)]
                scores, back = reversible(nn.Sequential(way, reader), moved)
                away = functional.softmax(scores + wrong, 1) - functional.softmax(scores + right, 1)
                gradients.append(_of_length_one(back(away)))
            step = _of_length_one(torch.stack(gradients).sum(0))
            change = change + step * reach * (_TOGETHER / self.count)
            change = change / (_length(change) / reach).clamp_min(1.0)
        return pictures + reach * _of_length_one(change)


def _length(change: Tensor) -> Tensor:
    return change.square().mean((1, 2, 3), keepdim=True).clamp_min(_TINY).sqrt()


def _of_length_one(change: Tensor) -> Tensor:
    return change / _length(change)
