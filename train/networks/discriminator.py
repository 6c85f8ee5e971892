"""D of the generative model: a shared trunk of three 5×5 layers, and one more for each of its two heads."""

from torch import Tensor, nn

from train.networks.classifiers.classifier import CLASSES

_WIDTHS = (64, 128, 256)


class Discriminator(nn.Module):
    """Pictures (N, 1, H, W) in [0, 1] → logits of D_rf, (N,): real; and of D_rec, (N, 10): which class."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((1, *_WIDTHS[:-1]), _WIDTHS, strict=True):
            layers += [nn.Conv2d(inputs, outputs, 5, stride=2, padding=2), nn.LeakyReLU(0.2, inplace=True)]
        self.trunk = nn.Sequential(*layers)
        self.real = nn.Conv2d(_WIDTHS[-1], 1, 5, padding=2)
        self.recognised = nn.Conv2d(_WIDTHS[-1], CLASSES, 5, padding=2)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(pictures * 2 - 1)
        real: Tensor = self.real(features).mean((1, 2, 3))
        recognised: Tensor = self.recognised(features).mean((2, 3))
        return real, recognised
