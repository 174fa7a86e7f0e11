"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .imagenet_resnet import ResNet18
from .lenet import LeNet5
from .resnet import CifarResNet
from .vgg import VGG16

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "resnet18": ResNet18,
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "vgg16": VGG16,
}


def names() -> tuple[str, ...]:
    """The names `build` knows."""
    return tuple(_BUILDERS)


def build(name: str, num_classes: int = 10, in_channels: int | None = None, **options: Any) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global random generator.

    Arguments:
        name: "lenet5", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110" or "vgg16"; for
            large images "resnet18", in the form made for ImageNet.
        num_classes: number of logits; ImageNet has 1,000.
        in_channels: channels of the images; None takes the network's usual number (lenet5 1, the others 3).
        options: lenet5: input_size=28; resnets from 20 on: option="A" (padded shortcuts) or "B" (1x1
            convolutions).

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
