"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .deit import DeiT
from .efficientnet import EfficientNetB0
from .imagenet_resnet import ResNet18
from .lenet import LeNet5
from .mobilenet import MobileNetV3
from .resnet import CifarResNet
from .vgg import VGG16

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "resnet18": ResNet18,
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "vgg16": VGG16,
    **{f"mobilenet_v3_{size}": partial(MobileNetV3, size) for size in ("small", "large")},
    "efficientnet_b0": EfficientNetB0,
    "deit_small": DeiT,
}

_IMAGENET = ("resnet18", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "deit_small")


def names() -> tuple[str, ...]:
    """The names `build` knows."""
    return tuple(_BUILDERS)


def image_size(name: str) -> int:
    """Height and width of the images a network is made for: 28, 32 or 224."""
    return 28 if name == "lenet5" else 224 if name in _IMAGENET else 32


def build(name: str, num_classes: int = 10, in_channels: int | None = None, **options: Any) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global random generator.

    Arguments:
        name: "lenet5", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110" or "vgg16"; for
            large images, in the forms made for ImageNet, "resnet18", "mobilenet_v3_small",
            "mobilenet_v3_large", "efficientnet_b0" or "deit_small".
        num_classes: number of logits; ImageNet has 1,000.
        in_channels: channels of the images; None takes the network's usual number (lenet5 1, the others 3).
        options: lenet5: input_size=28; resnets from 20 on: option="A" (padded shortcuts) or "B" (1x1
            convolutions); efficientnet_b0: drop=0.2; deit_small: image_size=224, patch=16, dim=384, depth=12,
            heads=6.

    Raises ValueError for an unknown name, listing the known ones; TypeError for an option the network does
    not have.
    """
    if name not in _BUILDERS:
        raise ValueError(f"models.build: unknown network {name!r}; known: {', '.join(_BUILDERS)}")
    if num_classes < 1:
        raise ValueError(f"models.build: num_classes must be at least 1, got {num_classes}")
    if in_channels is not None:
        if in_channels < 1:
            raise ValueError(f"models.build: in_channels must be at least 1, got {in_channels}")
        options["in_channels"] = in_channels
    return _BUILDERS[name](num_classes=num_classes, **options)
