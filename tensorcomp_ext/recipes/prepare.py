"""What training is asked for, checked before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tensorcomp_ext.data import Dataset

from . import processes
from .callbacks import Callback
from .options import NUMBERS, check_choice, check_flag, check_known, check_places
from .schedule import SCHEDULES
from .settings import OPTIMIZERS, PRECISIONS, Settings
from .task import Task, as_task

CHOICES = {"schedule": tuple(SCHEDULES), "optimizer": OPTIMIZERS, "precision": PRECISIONS}


def prepare(
    name: str,
    dataset: Dataset | Task,
    *,
    augment: bool | None,
    label_smoothing: float,
    channels_last: bool,
    parameters: list[dict[str, Any]] | None,
    callbacks: list[Callback],
    progress: Any,
    test_each_epoch: bool,
    checkpoint: Any,
    logs: Any,
    **options: Any,
) -> tuple[Task, Settings]:
    """The task and the settings of a run.

    Args:
        name: of the function asked, for messages.
        parameters, callbacks: as :func:`checked_groups` and :func:`checked_callbacks` leave them.
        options: those of :func:`.train` that :class:`.Settings` has.

    Raises:
        ValueError, TypeError: an option of another type or out of range, by name; places that cannot be
            written.
    """
    check_flag(name, "channels_last", channels_last)
    check_flag(name, "test_each_epoch", test_each_epoch)
    is_task = isinstance(dataset, Task)  # which knows its own memory format
    task = as_task(
        name,
        dataset,
        augment=augment,
        label_smoothing=label_smoothing,
        channels_last=channels_last and not is_task,
    )
    for option, value in options.items():
        if option in CHOICES:
            check_choice(name, option, value, CHOICES[option])
        else:
            check_known(name, option, value)
    if progress is not None and not callable(progress):
        raise TypeError(f"{name}: progress must be a function or None, got {progress!r}")
    check_places(name, checkpoint, logs)
    if test_each_epoch and task.test_size == 0:
        raise ValueError(f"{name}: test_each_epoch needs test examples, {task.name} has none")
    settings = Settings(
        task=task.settings(),
        examples=task.size,
        callbacks=[{"type": type(callback).__name__, **callback.settings()} for callback in callbacks],
        parameters=None if parameters is None else [_recorded(group) for group in parameters],
        processes=processes.count(),
        **options,
    )
    if task.size < 1:
        raise ValueError(f"{name}: {task.name} has no training examples")
    parts, batch = settings.processes * settings.accumulate, min(settings.batch_size, task.size)
    if batch % parts:
        raise ValueError(
            f"{name}: a batch of {batch} examples cannot be parted equally among {settings.processes} "
            f"processes with {settings.accumulate} parts each"
        )
    return task, settings


def check_model(name: str, model: Any, *, trained: bool = True) -> None:
    """Raise unless this is a network, of which something can be ``trained``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {model!r}")
    if trained and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{name}: model must have a parameter that requires gradients, got none")


def checked_callbacks(name: str, callbacks: Any) -> list[Callback]:
    """Callbacks as a list; TypeError for anything else."""
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"{name}: callbacks must be a sequence of Callback, got {callbacks!r}")
    found = list(callbacks)
    for callback in found:
        if not isinstance(callback, Callback):
            raise TypeError(f"{name}: callbacks must be a sequence of Callback, got {callback!r} among them")
    return found


def checked_groups(name: str, parameters: Any) -> list[dict[str, Any]] | None:
    """Groups for an optimiser, each with a list of parameters.

    Raises:
        TypeError: no groups, or a number of another type. ValueError: none, or nothing in them; a number out
            of range.
    """
    if parameters is None:
        return None
    expected = f"{name}: parameters must be None or groups, each a dict with 'params'"
    if not isinstance(parameters, Iterable) or isinstance(parameters, (Mapping, torch.Tensor)):
        raise TypeError(f"{expected}, got {type(parameters).__name__}")
    groups: list[dict[str, Any]] = []
    for given in parameters:
        if not isinstance(given, Mapping) or "params" not in given:
            raise TypeError(f"{expected}, got {type(given).__name__} among them")
        held = given["params"]
        group = {**given, "params": [held] if isinstance(held, torch.Tensor) else list(held)}
        for option in NUMBERS.keys() & group.keys():
            check_known(name, option, group[option], f"{option} of parameters[{len(groups)}]")
        groups.append(group)
    if not any(group["params"] for group in groups):
        raise ValueError(f"{expected}, got no parameter in {len(groups)} groups")
    return groups


def _recorded(group: Mapping[str, Any]) -> dict[str, Any]:
    """How many parameters, and the group's options in plain types."""
    plain = (bool, int, float, str, type(None))
    options = {k: v if isinstance(v, plain) else repr(v) for k, v in group.items() if k != "params"}
    return {**options, "params": len(group["params"])}
