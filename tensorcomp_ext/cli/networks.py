"""The network and the images that a command is about."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorcomp_ext import data, models
from tensorcomp_ext.cli.common import build_from, is_checkpoint
from tensorcomp_ext.compress.storage import read_header

# Side of the images a network is given, 32 unless named.
IMAGE_SIZE = {"lenet5": 28, "mlp": 28, "deit_small": 224, "alexnet": 224}


def load_images(model: str, dataset: str, root: Path | None, train: bool) -> data.Dataset | None:
    """A data set at the size the network takes; None where it needs a folder and there is none."""
    if root is None and dataset != "digits":
        return None
    size = IMAGE_SIZE.get(model, 32)
    return data.load(dataset, root, size=None if dataset == "mnist" and size == 28 else size, train=train)


def load_network(
    name: str, weights: Path | None, images: data.Dataset | None, drawn: bool = False, seed: int = 0
) -> tuple[nn.Module, data.Dataset | None, dict[str, Any]]:
    """The network with its weights, the images normalised as it expects them, and how to build it again.

    Without weights, which ``seed`` then draws, it warns, in other words where a recipe draws factors of its
    own (``drawn``).
    """
    options: dict[str, Any] = {}
    if images is not None:
        options = {"num_classes": len(images.classes), "in_channels": images.channels}
    if weights is None:
        owner = "the dense network beside the recipe's factors" if drawn else "the network"
        warnings.warn(f"no --weights: {owner} has random weights", stacklevel=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return models.build(name, **options), images, options
    if is_checkpoint(weights):
        header = read_header(weights)
        network = build_from(header, weights, name)
        recorded = header.meta.get("model")
        options = (
            {k: v for k, v in recorded.items() if k != "name"} if isinstance(recorded, dict) else options
        )
        normalization = header.meta.get("normalization")
        pair = (normalization["mean"], normalization["std"]) if isinstance(normalization, dict) else None
    else:
        network = models.build(name, **options)
        pair = models.load_weights(network, weights)
    if images is not None and pair is not None:
        images = images.with_normalization(*pair)
    return network, images, options


def example(
    images: data.Dataset | None, options: dict[str, Any], model: str, batch: int, channels_last: bool
) -> torch.Tensor:
    """A batch of the size wanted: test images, over again where they run out, else noise of their shape."""
    if images is None:
        size = int(options.get("input_size", models.image_size(model)))
        channels = int(options.get("in_channels", models.image_channels(model)))
        x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    else:
        x = images.normalize(images.test_images[torch.arange(batch) % len(images.test_labels)])
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
