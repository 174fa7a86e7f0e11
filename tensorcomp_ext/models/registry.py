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
from .mlp import MLP
from .mobilenet import MobileNetV3
from .resnet import CifarResNet
from .torchvision_networks import NETWORKS as _TORCHVISION
from .torchvision_networks import installed, torchvision_network
from .vgg import VGG16

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "mlp": MLP,
    "resnet18": ResNet18,
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "vgg16": VGG16,
    **{f"mobilenet_v3_{size}": partial(MobileNetV3, size) for size in ("small", "large")},
    "efficientnet_b0": EfficientNetB0,
    "deit_small": DeiT,
    **{name: partial(torchvision_network, name) for name in _TORCHVISION},
}

_IMAGENET = ("resnet18", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "deit_small")
_GREY = ("lenet5", "mlp")


def names() -> tuple[str, ...]:
    """The names `build` knows; those of torchvision's networks only where it is installed."""
    return tuple(name for name in _BUILDERS if name not in _TORCHVISION or installed())


def image_size(name: str) -> int:
    """Height and width of the images a network is made for: 28, 32 or 224."""
    return 28 if name in _GREY else 224 if name in (*_IMAGENET, *_TORCHVISION) else 32


def image_channels(name: str) -> int:
    """Channels of the images a network is made for: 1 or 3."""
    return 1 if name in _GREY else 3


def build(name: str, num_classes: int = 10, in_channels: int | None = None, **options: Any) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global random generator.

    Arguments:
        name: "lenet5", "mlp", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110" or "vgg16"; for
            large images, in the forms made for ImageNet, "resnet18", "mobilenet_v3_small",
            "mobilenet_v3_large", "efficientnet_b0" or "deit_small"; with torchvision installed its "alexnet",
            "googlenet" (without auxiliary heads) or "densenet121".
        num_classes: number of logits; ImageNet has 1,000.
        in_channels: channels of the images; None takes the network's usual number (lenet5 and mlp 1, the
            others 3).
        options: lenet5: input_size=28; mlp: input_size=28, hidden=625; resnets from 20 on: option="A" (padded
            shortcuts) or "B" (1x1 convolutions); efficientnet_b0: drop=0.2; deit_small: image_size=224,
            patch=16, dim=384, depth=12, heads=6; torchvision's networks: what its functions take.

    Raises ValueError for an unknown name, listing the known ones; TypeError for an option the network does
    not have; ModuleNotFoundError for a network of torchvision where that is missing.
    """
    if name not in _BUILDERS:
        raise ValueError(f"models.build: unknown network {name!r}; known: {', '.join(names())}")
    if num_classes < 1:
        raise ValueError(f"models.build: num_classes must be at least 1, got {num_classes}")
    if in_channels is not None:
        if in_channels < 1:
            raise ValueError(f"models.build: in_channels must be at least 1, got {in_channels}")
        options["in_channels"] = in_channels
    return _BUILDERS[name](num_classes=num_classes, **options)
