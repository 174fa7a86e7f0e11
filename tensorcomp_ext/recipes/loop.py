"""One epoch of training, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from . import processes
from .callbacks import Callback, TrainState
from .evaluate import Accuracy, device_of
from .schedule import warmed_up
from .settings import Epoch, Settings

Progress = Callable[[TrainState], None]


def run_epoch(
    state: TrainState, settings: Settings, callbacks: Sequence[Callback], progress: Progress | None
) -> Epoch:
    """One pass over the examples.

    Of several processes each takes its share of every batch, so that a step is that of the whole batch.

    Raises:
        RuntimeError: a loss that is no longer finite; all processes hear of it.
    """
    started = perf_counter()
    device = device_of(state.model)
    order, generator = _draw(settings, state.epoch, device)
    size = min(settings.batch_size, settings.examples)
    steps = settings.examples // size
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of losses, right answers and answers
    for indices in order.split(size)[:steps]:
        factor = warmed_up(settings.schedule, state.step, state.steps, settings.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
        if state.changed:
            state.call, state.changed = processes.averaging(state.model), False
        own = indices.chunk(settings.processes)[processes.place()]
        _step(state, own.chunk(settings.accumulate), generator, callbacks, sums)
        for callback in callbacks:
            callback.on_step(state)
        if progress is not None:
            progress(state)
        state.step += 1
    loss, correct, seen = processes.total(sums).tolist()
    loss /= steps * settings.processes
    if not math.isfinite(loss):
        raise RuntimeError(f"train: the loss is {loss} in epoch {state.epoch + 1}; try a smaller lr")
    lr = float(state.optimizer.param_groups[0]["lr"])
    counted = Accuracy(int(correct), int(seen))
    return Epoch(state.epoch + 1, loss, counted, None, lr, perf_counter() - started)


def _draw(settings: Settings, epoch: int, device: torch.device) -> tuple[torch.Tensor, torch.Generator]:
    """The order of an epoch's examples, and what augments them; torch's generators are set for dropout."""
    seed = settings.seed * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(settings.examples, generator=generator)
    if settings.processes > 1:  # each process draws its own augmentation and dropout
        seed = (seed * settings.processes + processes.place() + 1) * 2_147_483_647 % (1 << 62)
        generator.manual_seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    return order, generator


def _step(
    state: TrainState,
    parts: Sequence[torch.Tensor],
    generator: torch.Generator,
    callbacks: Sequence[Callback],
    sums: torch.Tensor,
) -> None:
    """Gradients of all parts of a batch, then one step of the optimiser."""
    device = device_of(state.model)
    state.optimizer.zero_grad(set_to_none=True)
    mean = torch.zeros((), dtype=torch.float64, device=device)
    for place, part in enumerate(parts):
        state.inputs, state.labels = state.task.batch_for(state.model, part, generator)
        for callback in callbacks:
            callback.on_batch(state)
        with _alone(state, place + 1 < len(parts)):
            loss = state.forward()
            assert state.outputs is not None
            correct, seen = state.task.count(state.outputs, state.labels)
            for callback in callbacks:
                loss = callback.on_loss(state, loss)
            loss = loss / len(parts)
            loss.backward()
        mean += loss.detach()
        sums[1] += correct
        sums[2] += seen
    state.optimizer.step()
    state.loss = mean
    sums[0] += mean


def _alone(state: TrainState, more: bool) -> Any:
    """Where more parts of a batch follow, processes need not yet average their gradients."""
    return state.call.no_sync() if more and isinstance(state.call, DistributedDataParallel) else nullcontext()
