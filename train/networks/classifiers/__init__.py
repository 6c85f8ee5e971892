"""Small classifiers: the paper's two, surrogates to train against, and judges that no veil is trained against."""

from collections.abc import Callable, Mapping

from train.networks.classifiers.classifier import Classifier
from train.networks.classifiers.convnext import convnext
from train.networks.classifiers.densenet import densenet
from train.networks.classifiers.mobilenet import mobilenet_v2
from train.networks.classifiers.resnet import resnet14, resnet110
from train.networks.classifiers.surrogates import convmixer, convmixer_ln, convnet8, inception, mixer
from train.networks.classifiers.vgg import vgg16
from train.networks.classifiers.vit import vit

PAPER: Mapping[str, Callable[[], Classifier]] = {"vgg16": vgg16, "resnet110": resnet110}
SURROGATES: Mapping[str, Callable[[], Classifier]] = {
    "convnet8": convnet8,
    "resnet14": resnet14,
    "inception": inception,
    "mixer": mixer,
    "convmixer": convmixer,
    "convmixer_ln": convmixer_ln,
}
JUDGES: Mapping[str, Callable[[], Classifier]] = {
    "mobilenet_v2": mobilenet_v2,
    "densenet": densenet,
    "convnext": convnext,
    "vit": vit,
}
CLASSIFIERS: Mapping[str, Callable[[], Classifier]] = {**PAPER, **SURROGATES, **JUDGES}
