"""Networks as torchvision defines them, where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

# What each needs besides the number of classes: GoogLeNet's auxiliary heads are for training alone, and where
# nothing is said about its initialisation torchvision warns.
NETWORKS: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "googlenet": {"aux_logits": False, "init_weights": True},
    "densenet121": {},
}


def installed() -> bool:
    """Whether there is a torchvision to import."""
    return find_spec("torchvision") is not None


def torchvision_network(
    name: str, num_classes: int = 1000, in_channels: int = 3, **options: Any
) -> nn.Module:
    """AlexNet, GoogLeNet without auxiliary heads or DenseNet-121 with fresh weights.

    With ten classes 57,044,810, 5,610,154 and 6,964,106 parameters. Parameters have torchvision's names,
    whose state dicts load (GoogLeNet's without those of the auxiliary heads).

    Arguments:
        name: "alexnet", "googlenet" or "densenet121".
        num_classes: number of logits.
        in_channels: of the images, 3.
        options: of torchvision's function, such as ``dropout`` of alexnet.

    Input [N, 3, H, W], 224 x 224 for AlexNet, to which smaller images have to be upscaled; output
    [N, num_classes].
    Raises ValueError for another name or number of channels; ModuleNotFoundError without torchvision.
    Source: Krizhevsky 2014; Szegedy et al. 2015; Huang et al. 2017.
    """
    if name not in NETWORKS:
        raise ValueError(f"torchvision_network: name must be one of {', '.join(NETWORKS)}, got {name!r}")
    if in_channels != 3:
        raise ValueError(f"torchvision_network: {name} takes images of 3 channels, got {in_channels}")
    if not installed():
        raise ModuleNotFoundError(f"the network {name} needs torchvision: pip install torchvision")
    import torchvision

    build = getattr(torchvision.models, name)
    model: nn.Module = build(num_classes=num_classes, **{**NETWORKS[name], **options})
    return model
