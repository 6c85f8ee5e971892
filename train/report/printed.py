"""What the paper prints for CIFAR-10's test set, per sampling ratio 0.1, 0.2 and 0.3."""

from collections.abc import Mapping

RATIOS = (10, 20, 30)
"""Sampling ratios in percent, as run names have them."""

Row = tuple[float, float, float]

RECOGNITION: Mapping[str, Row] = {
    "CSNet": (28.92, 50.76, 69.43),
    "Adv-CSNet-VGG": (10.82, 13.51, 15.84),
    "Adv-CSNet-ResNet": (19.56, 27.85, 34.61),
    "Adv-CSNet": (12.06, 11.06, 14.52),
}
"""Table 1: recognition accuracy in percent, mean of VGG-16 and ResNet-110."""

GENERALISATION: Mapping[tuple[str, str], Row] = {
    ("Adv-CSNet-VGG", "vgg16"): (10.69, 12.95, 14.75),
    ("Adv-CSNet-VGG", "resnet110"): (10.95, 14.07, 16.92),
    ("Adv-CSNet-ResNet", "vgg16"): (25.91, 42.94, 53.36),
    ("Adv-CSNet-ResNet", "resnet110"): (13.20, 12.76, 15.86),
    ("Adv-CSNet", "vgg16"): (11.60, 9.01, 13.55),
    ("Adv-CSNet", "resnet110"): (12.51, 13.11, 15.49),
}
"""Table 2: accuracy in percent of each classifier on each model's pictures."""

PSNR: Mapping[str, Row] = {
    "CSNet": (25.01, 28.51, 31.19),
    "Adv-CSNet-VGG": (24.95, 28.40, 30.50),
    "Adv-CSNet-ResNet": (24.63, 28.07, 30.51),
    "Adv-CSNet": (23.75, 25.52, 26.45),
}
"""Table 3: PSNR in dB."""

MODELS: Mapping[str, tuple[str, str | None]] = {
    "csnet": ("CSNet", "CSNet"),
    "refined": ("CSNet, refined", None),
    "adv-csnet-vgg": ("Adv-CSNet-VGG, L_C of logits", "Adv-CSNet-VGG"),
    "adv-csnet-vgg-softmax": ("Adv-CSNet-VGG, L_C of a softmax", "Adv-CSNet-VGG"),
    "adv-csnet-resnet": ("Adv-CSNet-ResNet, L_C of logits", "Adv-CSNet-ResNet"),
    "adv-csnet-resnet-softmax": ("Adv-CSNet-ResNet, L_C of a softmax", "Adv-CSNet-ResNet"),
    "adv-csnet-gamma0": ("Adv-CSNet, γ_D = 0 as printed", "Adv-CSNet"),
    "adv-csnet-gamma1": ("Adv-CSNet, γ_D = 1", "Adv-CSNet"),
    "adv-csnet-e": ("Adv-CSNet-E", None),
    "adv-csnet-s": ("Adv-CSNet-S", None),
}
"""Our runs without their ratio: how a table calls them, and the paper's row that they stand beside."""
