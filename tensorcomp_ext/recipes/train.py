"""The training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorcomp_ext.data import Dataset
from tensorcomp_ext.plan.modes import modes_kept

from . import processes
from .callbacks import Callback, TrainState
from .checkpoint import check_settings, load_model_state, read_checkpoint, write_checkpoint
from .evaluate import device_of
from .logs import Logs
from .loop import Progress, run_epoch
from .normalization import begin_training
from .prepare import check_model, checked_callbacks, checked_groups, prepare
from .settings import Epoch, Settings, TrainResult
from .task import ImageTask, Task

FINETUNING: dict[str, Any] = {"weight_decay": 1e-4, "schedule": "cosine"}
"""What :func:`finetune` takes unless it is given."""


def train(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    epochs: int,
    lr: float = 0.1,
    batch_size: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: str = "onecycle",
    warmup: int = 0,
    optimizer: str = "sgd",
    augment: bool | None = None,
    label_smoothing: float = 0.0,
    precision: str = "float32",
    accumulate: int = 1,
    seed: int = 0,
    channels_last: bool = False,
    parameters: Sequence[Mapping[str, Any]] | None = None,
    callbacks: Iterable[Callback] = (),
    progress: Progress | None = None,
    test_each_epoch: bool = False,
    checkpoint: str | Path | None = None,
    logs: str | Path | None = None,
) -> TrainResult:
    """Minimise the mean loss by SGD or Adam, in place; on a CPU resumable bit by bit.

    Every epoch draws its order, augmentation and dropout from (seed, epoch) alone, and the learning rate is a
    function of the step, so a run killed at any moment and started again with the same arguments continues
    from the last finished epoch exactly as if it had not been. torch's global random state is left as it was.

    Started by torchrun, after ``torch.distributed.init_process_group``, every process takes its share of each
    batch and gradients are averaged by DistributedDataParallel, or by ``fully_shard`` where the model is
    sharded so; the first process writes checkpoints and logs.

    Arguments:
        model: maps the task's inputs to its answers, images [N, C, H, W] to logits [N, classes]; trained
            where it lies, its modes restored. Of a network in training mode, submodules in evaluation mode
            stay so, such as batch normalisation somebody has frozen. One that is in evaluation mode is put
            into training mode, but for batch normalisation whose weights and biases require no gradients.
        dataset: images, or any `Task`; what is for testing serves for the record only, with test_each_epoch.
        epochs: passes over the examples; an incomplete last batch of a pass is dropped.
        lr: largest learning rate.
        batch_size: examples per step, of all processes together; all at once where there are fewer.
        momentum: Nesterov's; of Adam its first decay rate.
        weight_decay: L2 coefficient on every parameter; with "adamw" decoupled from the gradient.
        schedule: "onecycle", "cosine", "constant", "decay" or "multistep".
        warmup: steps over which the learning rate grows linearly to the schedule's.
        optimizer: "sgd", "adam" (Kingma & Ba 2015) or "adamw" (Loshchilov & Hutter 2019); lr of the latter
            two should be about 1e-3.
        augment: shift images by up to 4 pixels and mirror; None does so for CIFAR only (digits must not be
            mirrored).
        label_smoothing: weight of the uniform distribution in the targets of images, 0..1.
        precision: "float32", or "bf16": forward passes under autocast to bfloat16, weights as they are.
        accumulate: parts into which each batch is cut, whose gradients are added up, to save memory.
        seed: of order, augmentation and dropout; initial weights are the caller's.
        channels_last: convert model and images to the layout that convolutions on CPUs like best.
        parameters: optimiser groups as torch.optim takes them, each with its own "lr" or "weight_decay" where
            wanted; None trains all parameters that require gradients.
        callbacks: training methods, called in order; see `Callback`.
        progress: called after every step.
        test_each_epoch: evaluate the test examples after every epoch, for the history.
        checkpoint: file written atomically after every epoch, and resumed from where it exists.
        logs: folder for history.csv, history.jsonl and, where it is installed, TensorBoard's events.

    Raises ValueError for impossible arguments or a checkpoint of other settings, another model or damaged,
    TypeError for arguments of other types, all before anything is changed; RuntimeError when the loss is no
    longer finite, naming the epoch.
    """
    name = "train"
    groups = checked_groups(name, parameters)
    check_model(name, model, trained=groups is None)
    callbacks = checked_callbacks(name, callbacks)
    task, settings = prepare(
        name,
        dataset,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        optimizer=optimizer,
        augment=augment,
        label_smoothing=label_smoothing,
        precision=precision,
        accumulate=accumulate,
        seed=seed,
        channels_last=channels_last,
        parameters=groups,
        callbacks=callbacks,
        progress=progress,
        test_each_epoch=test_each_epoch,
        checkpoint=checkpoint,
        logs=logs,
    )
    if checkpoint is not None and processes.is_sharded(model):
        raise ValueError("train: a sharded model has no checkpoint file; use torch.distributed.checkpoint")
    # What is sharded would stay gathered after a forward pass without a backward one.
    if epochs and not processes.is_sharded(model):
        task.check(name, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    descent = _optimizer(optimizer, groups or trained, lr, momentum, weight_decay)
    for group in descent.param_groups:
        group["peak_lr"] = group["lr"]
    steps = epochs * max(1, task.size // batch_size)
    state = TrainState(model, descent, task, epochs, steps, precision=precision, changed=True)
    history = [] if checkpoint is None else _resumed(Path(checkpoint), settings, state, callbacks)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    written = Logs(logs) if logs is not None and processes.place() == 0 else None
    if written is not None and history:
        written.write(history)  # a run may have been killed between its checkpoint and its logs

    def keep() -> None:
        if checkpoint is not None:
            write_checkpoint(checkpoint, _content(state, settings, callbacks, history))
        if written is not None:
            written.write(history)

    with modes_kept(model), torch.random.fork_rng(devices):
        begin_training(model)
        for callback in callbacks:
            callback.on_start(state)
        for epoch in range(len(history), epochs):
            state.epoch, state.step = epoch, epoch * (steps // epochs)
            history.append(_epoch(state, settings, callbacks, progress, test_each_epoch))
            processes.first_alone(device, keep)
    if written is not None:
        written.close()
    return TrainResult(model, history)


def finetune(
    model: nn.Module, dataset: Dataset | Task, *, epochs: int = 1, lr: float = 0.01, **options: Any
) -> TrainResult:
    """Train a network that already works: `train` with a small learning rate that falls from the start.

    Arguments: those of `train`, with weight_decay 1e-4 and schedule "cosine" unless given.
    """
    return train(model, dataset, epochs=epochs, lr=lr, **{**FINETUNING, **options})


def _optimizer(
    name: str, parameters: Any, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    if name == "sgd":
        nesterov = momentum > 0
        return torch.optim.SGD(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)


def _epoch(
    state: TrainState,
    settings: Settings,
    callbacks: Sequence[Callback],
    progress: Progress | None,
    test_each_epoch: bool,
) -> Epoch:
    """An epoch, the test examples after it, and then what methods do between epochs."""
    record = run_epoch(state, settings, callbacks, progress)
    processes.share_buffers(state.model)
    if test_each_epoch:
        with modes_kept(state.model):
            test, figures = state.task.evaluate(state.model)
        record = replace(record, test=test, extra=dict(figures))
    for callback in callbacks:
        callback.on_epoch(state)
    extra = dict(record.extra)
    for callback in callbacks:
        extra |= callback.log()
    return replace(record, extra=extra)


def _resumed(path: Path, settings: Settings, state: TrainState, callbacks: Sequence[Callback]) -> list[Epoch]:
    """The history of a checkpoint, with network, optimiser and methods as they were; empty without one."""
    if not path.exists():
        return []
    saved = read_checkpoint(path)
    wanted = settings.recorded()
    check_settings(path, Settings.completed(saved, wanted), wanted)
    kept = list(zip(callbacks, saved["callbacks"], strict=True))
    for callback, found in kept:
        callback.reshape(state, found)
    state.optimizer.load_state_dict(saved["optimizer"])
    load_model_state(path, state.model, saved["model"])
    for callback, found in kept:
        callback.load_state_dict(found)
    return [Epoch.from_dict(entry) for entry in saved["history"]]


def _content(
    state: TrainState, settings: Settings, callbacks: Sequence[Callback], history: Sequence[Epoch]
) -> dict[str, Any]:
    """What a checkpoint holds."""
    content: dict[str, Any] = {
        "settings": settings.recorded(),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "callbacks": [callback.state_dict() for callback in callbacks],
        "history": [entry.to_dict() for entry in history],
    }
    if isinstance(state.task, ImageTask):
        data = state.task.dataset
        content["normalization"] = {"mean": list(data.mean), "std": list(data.std)}
    return content
