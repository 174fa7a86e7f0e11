"""Batch normalisation: what its user has frozen, and its statistics after a decomposition."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tensorcomp_ext.data import Dataset
from tensorcomp_ext.plan.modes import modes_kept

from .task import ImageTask, Task, as_task


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Batch normalisations that neither training nor recalibration should touch.

    In a network in training mode those in evaluation mode; in one in evaluation mode, as trained networks
    are handed over, those that have weights and biases of which none requires gradients.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if model.training:
        return [norm for norm in norms if not norm.training]
    return [n for n in norms if n.affine and not any(p.requires_grad for p in n.parameters())]


def begin_training(model: nn.Module) -> None:
    """Put a network into training mode, but for what its user has frozen; see :func:`.train`."""
    if model.training:
        return  # and so are its submodules, but for those somebody has put into evaluation mode
    frozen = frozen_norms(model)
    model.train()
    for norm in frozen:
        norm.eval()


def unaugmented(task: Task) -> Task:
    """The task with its training examples as they are."""
    if isinstance(task, ImageTask) and task.augment:
        task = copy.copy(task)
        task.augment = False
    return task


def recalibrate_batchnorm(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    batches: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    channels_last: bool = False,
) -> int:
    """Measure the running mean and variance of every batch normalisation again, on training examples only.

    A decomposed layer's outputs have other statistics than those recorded with the dense weights; measuring
    them again recovers part of the lost accuracy without any gradient. The new statistics are the plain
    average over the batches.

    Arguments:
        model: changed in place: running_mean, running_var and num_batches_tracked only, of normalisations
            that are not frozen: in a network in training mode those in evaluation mode are, in one in
            evaluation mode those whose weights and biases require no gradients. Where the model fails, they
            are as before.
        dataset: its training examples are used, without augmentation.
        batches: number of batches of batch_size examples, drawn without replacement; fewer where the examples
            run out.
        seed: of the drawing.
        channels_last: memory format of images; a task has its own.

    Returns the number of batch normalisations measured. Costs one forward pass of batches * batch_size
    examples. Raises ValueError for batches or batch_size below 1, or where there are no training examples.
    """
    if batches < 1 or batch_size < 1:
        raise ValueError(
            "recalibrate_batchnorm: batches and batch_size must be at least 1, "
            f"got {batches} and {batch_size}"
        )
    task = unaugmented(as_task("recalibrate_batchnorm", dataset, channels_last=channels_last))
    frozen = {id(norm) for norm in frozen_norms(model)}
    norms = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and id(m) not in frozen
    ]
    if not norms:
        return 0
    if not task.size:
        raise ValueError(f"recalibrate_batchnorm: {task.name} has no training images")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(task.size, generator=generator)
    chosen = [part for part in order.split(batch_size)[:batches] if len(part) == batch_size] or [order]
    before = [(norm.momentum, [(b, b.clone()) for b in norm.buffers()]) for norm in norms]
    done = False
    with modes_kept(model), torch.no_grad():
        model.eval()
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average, every batch with the same weight
                norm.train()
            for part in chosen:
                model(*task.batch_for(model, part, generator).inputs)
            done = True
        finally:
            for norm, (momentum, buffers) in zip(norms, before, strict=True):
                norm.momentum = momentum
                for buffer, value in buffers if not done else ():
                    buffer.copy_(value)
    return len(norms)
