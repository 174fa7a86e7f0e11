"""Counting correct answers, and refreshing batch normalisation after a decomposition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tensorcomp_ext.data import Dataset


class Accuracy(NamedTuple):
    """How many of how many images were classified correctly."""

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """Correct / total, 0..1."""
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{100 * self.fraction:.2f} % ({self.correct:,} of {self.total:,})"


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; CPU for a model without any."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore every submodule's training mode on leaving: a user may have frozen some of them."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    split: str = "test",
    *,
    batch_size: int = 256,
    channels_last: bool = False,
) -> Accuracy:
    """Top-1 accuracy: how often argmax_k model(x)_k equals the label.

    Arguments:
        model: maps normalised images [N, C, H, W] to logits [N, classes]; evaluated on its device, in
            evaluation mode and inference mode, its training modes restored afterwards.
        dataset: normalised with its mean and std.
        split: "test" or "train".
        batch_size: images at a time.
        channels_last: memory format of the images; the faster one on CPUs where the model has it too.

    Raises ValueError for another split, an empty one, or a batch_size below 1.
    """
    images, labels = dataset.split(split)
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    if not len(labels):
        raise ValueError(f"evaluate: {dataset.name} has no {split} images")
    device = device_of(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for start in range(0, len(labels), batch_size):
            batch = images[start : start + batch_size].to(device, memory_format=layout)
            answers = model(dataset.normalize(batch)).argmax(1)
            correct += (answers == labels[start : start + batch_size].to(device)).sum()
    return Accuracy(int(correct), len(labels))


def recalibrate_batchnorm(
    model: nn.Module,
    dataset: Dataset,
    *,
    batches: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    channels_last: bool = False,
) -> int:
    """Measure the running mean and variance of every batch normalisation again, on training images only.

    A decomposed layer's outputs have other statistics than those recorded with the dense weights; measuring
    them again recovers part of the lost accuracy without any gradient. The new statistics are the plain
    average over the batches.

    Arguments:
        model: changed in place: running_mean, running_var and num_batches_tracked only.
        dataset: its training images are used, without augmentation.
        batches: number of batches of batch_size images, drawn without replacement; fewer where the images run
            out.
        seed: of the drawing.
        channels_last: memory format of the images.

    Returns the number of batch normalisations. Costs one forward pass of batches * batch_size images. Raises
    ValueError for batches or batch_size below 1, or where there are no training images.
    """
    if batches < 1 or batch_size < 1:
        raise ValueError(
            "recalibrate_batchnorm: batches and batch_size must be at least 1, "
            f"got {batches} and {batch_size}"
        )
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    if not len(dataset.train_labels):
        raise ValueError(f"recalibrate_batchnorm: {dataset.name} has no training images")
    device = device_of(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(seed))
    chosen = [part for part in order.split(batch_size)[:batches] if len(part) == batch_size] or [order]
    momenta = [norm.momentum for norm in norms]
    with modes_kept(model), torch.no_grad():
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average, every batch with the same weight
            norm.train()
        try:
            for part in chosen:
                batch = dataset.train_images[part].to(device, memory_format=layout)
                model(dataset.normalize(batch))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return len(norms)
