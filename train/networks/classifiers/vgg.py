"""VGG (Simonyan and Zisserman 2014, configuration D) in its CIFAR variant: batch normalisation, one linear layer."""

from torch import nn

from train.networks.classifiers.classifier import Classifier, Pooled, conv_bn_relu

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_HALFWAY = 3


def vgg16() -> Classifier:
    """15 million weights, 0.31 billion multiplications for 32×32; pictures at least 32 pixels a side."""
    channels, stages = 1, []
    for widths in _STAGES:
        layers: list[nn.Module] = []
        for width in widths:
            layers.append(conv_bn_relu(channels, width))
            channels = width
        stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
    return Classifier(nn.Sequential(*stages[:_HALFWAY]), nn.Sequential(*stages[_HALFWAY:], Pooled(channels)))
