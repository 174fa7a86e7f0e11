"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tensorcomp_ext.data import Dataset

from .augment import crop_and_flip
from .callbacks import Callback, TrainState
from .checkpoint import check_settings, load_model_state, read_checkpoint, write_checkpoint
from .evaluate import Accuracy, device_of, evaluate, modes_kept
from .schedule import SCHEDULES
from .settings import Epoch, Settings, TrainResult, check_run

Progress = Callable[[TrainState], None]


def train(
    model: nn.Module,
    dataset: Dataset,
    *,
    epochs: int,
    lr: float = 0.1,
    batch_size: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: str = "onecycle",
    optimizer: str = "sgd",
    augment: bool | None = None,
    label_smoothing: float = 0.0,
    seed: int = 0,
    channels_last: bool = False,
    parameters: Sequence[Mapping[str, Any]] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
    test_each_epoch: bool = False,
    checkpoint: str | Path | None = None,
) -> TrainResult:
    """Minimise the mean cross-entropy by SGD or Adam, in place; on a CPU resumable bit by bit.

    Every epoch draws its order, augmentation and dropout from (seed, epoch) alone, and the learning rate is a
    function of the step, so a run killed at any moment and started again with the same arguments continues
    from the last finished epoch exactly as if it had not been. torch's global random state is left as it was.

    Arguments:
        model: maps images [N, C, H, W] to logits [N, classes]; trained where it lies, its training modes
            restored.
        dataset: its training images are used; test images only for the record, with test_each_epoch.
        epochs: passes over the images; an incomplete last batch of a pass is dropped.
        lr: largest learning rate.
        batch_size: images per step; all images at once where there are fewer.
        momentum: Nesterov's; of Adam its first decay rate.
        weight_decay: L2 coefficient on every parameter.
        schedule: "onecycle", "cosine", "constant" or "decay".
        optimizer: "sgd" or "adam" (Kingma & Ba 2015), for which lr should be about 1e-3.
        augment: shift by up to 4 pixels and mirror; None does so for cifar10 only (digits must not be
            mirrored).
        label_smoothing: weight of the uniform distribution in the targets, 0..1.
        seed: of order, augmentation and dropout; initial weights are the caller's.
        channels_last: convert model and images to the layout that convolutions on CPUs like best.
        parameters: optimiser groups as torch.optim takes them, each with its own "lr" or "weight_decay" where
            wanted; None trains all parameters that require gradients.
        callbacks: training methods, called in order; see `Callback`.
        progress: called after every step.
        test_each_epoch: evaluate the test images after every epoch, for the history.
        checkpoint: file written atomically after every epoch, and resumed from where it exists.

    Raises ValueError for impossible arguments or a checkpoint of other settings, another model or damaged,
    TypeError for another dataset than a `Dataset`, all before anything is changed; RuntimeError when the loss
    is no longer finite, naming the epoch.
    """
    check_run("train", dataset, epochs)
    wants_augment = dataset.name == "cifar10" if augment is None else augment
    settings = Settings(
        dataset=dataset.name,
        images=len(dataset.train_labels),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        optimizer=optimizer,
        augment=wants_augment,
        label_smoothing=label_smoothing,
        seed=seed,
        channels_last=channels_last,
        callbacks=[{"type": type(callback).__name__, **callback.settings()} for callback in callbacks],
    )
    settings.check()
    device = device_of(model)
    groups = (
        [dict(g) for g in parameters] if parameters else [p for p in model.parameters() if p.requires_grad]
    )
    steps_per_epoch = max(1, settings.images // batch_size)
    descent = _optimizer(optimizer, groups, lr, momentum, weight_decay)
    for group in descent.param_groups:
        group["peak_lr"] = group["lr"]
    history: list[Epoch] = []
    if checkpoint is not None and Path(checkpoint).exists():
        saved = read_checkpoint(checkpoint)
        check_settings(checkpoint, {"optimizer": "sgd", **saved["settings"]}, asdict(settings))
        descent.load_state_dict(saved["optimizer"])
        load_model_state(checkpoint, model, saved["model"])
        for callback, kept in zip(callbacks, saved["callbacks"], strict=True):
            callback.load_state_dict(kept)
        history = [Epoch.from_dict(entry) for entry in saved["history"]]
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState(model, descent, dataset, epochs, epochs * steps_per_epoch)
    devices = [device] if device.type == "cuda" else []
    with modes_kept(model), torch.random.fork_rng(devices):
        model.train()
        for callback in callbacks:
            callback.on_start(state)
        for epoch in range(len(history), epochs):
            state.epoch, state.step = epoch, epoch * steps_per_epoch
            record = _run_epoch(state, settings, callbacks, progress)
            for callback in callbacks:
                callback.on_epoch(state)
            test = evaluate(model, dataset, channels_last=channels_last) if test_each_epoch else None
            history.append(Epoch(epoch + 1, *record[:2], test, *record[2:]))
            if checkpoint is not None:
                write_checkpoint(
                    checkpoint,
                    {
                        "settings": asdict(settings),
                        "model": model.state_dict(),
                        "optimizer": descent.state_dict(),
                        "callbacks": [callback.state_dict() for callback in callbacks],
                        "history": [entry.to_dict() for entry in history],
                        "normalization": {"mean": list(dataset.mean), "std": list(dataset.std)},
                    },
                )
    return TrainResult(model, history)


def _optimizer(
    name: str, parameters: Any, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)
    nesterov = momentum > 0
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


def finetune(
    model: nn.Module, dataset: Dataset, *, epochs: int = 1, lr: float = 0.01, **options: Any
) -> TrainResult:
    """Train a network that already works: `train` with a small learning rate that falls from the start.

    Arguments: those of `train`, with weight_decay 1e-4 and schedule "cosine" unless given.
    """
    return train(
        model, dataset, epochs=epochs, lr=lr, **{"weight_decay": 1e-4, "schedule": "cosine", **options}
    )


def _run_epoch(
    state: TrainState, settings: Settings, callbacks: Sequence[Callback], progress: Progress | None
) -> tuple[float, Accuracy, float, float]:
    """One pass over the images: mean loss, correct answers, last learning rate, seconds."""
    started = perf_counter()
    model, optimizer, dataset = state.model, state.optimizer, state.dataset
    device = device_of(model)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    seed = settings.seed * 1_000_003 + state.epoch
    generator = torch.Generator().manual_seed(seed)
    torch.default_generator.manual_seed(seed)  # dropout and whatever else the model draws
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    order = torch.randperm(settings.images, generator=generator)
    size = min(settings.batch_size, settings.images)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    seen = 0
    for part in order.split(size)[: settings.images // size]:
        factor = SCHEDULES[settings.schedule](state.step, state.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        images = dataset.train_images[part]
        if settings.augment:
            images = crop_and_flip(images, generator)
        state.images = dataset.normalize(images.to(device, memory_format=layout))
        state.labels = dataset.train_labels[part].to(device)
        state.outputs = model(state.images)
        loss = F.cross_entropy(state.outputs, state.labels, label_smoothing=settings.label_smoothing)
        for callback in callbacks:
            loss = callback.on_loss(state, loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        state.loss = loss.detach()
        total_loss += state.loss
        correct += (state.outputs.detach().argmax(1) == state.labels).sum()
        seen += len(part)
        for callback in callbacks:
            callback.on_step(state)
        if progress is not None:
            progress(state)
        state.step += 1
    steps = settings.images // size
    mean_loss = float(total_loss) / steps
    if not math.isfinite(mean_loss):
        raise RuntimeError(f"train: the loss is {mean_loss} in epoch {state.epoch + 1}; try a smaller lr")
    lr = float(optimizer.param_groups[0]["lr"])
    return mean_loss, Accuracy(int(correct), seen), lr, perf_counter() - started
