"""Training in several processes, as torchrun starts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def count() -> int:
    """How many processes train together: 1 unless torch.distributed has begun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters lie in parts in several processes, as fully_shard leaves them."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def averaging(model: nn.Module) -> nn.Module:
    """What is called instead of the model, so that all processes get the mean of their gradients.

    The model itself where it is alone or sharded. Takes parameters and buffers of the first process; later
    only :func:`share_buffers` does so.
    """
    if count() == 1 or is_sharded(model):
        return model
    device = next(model.parameters()).device
    # Buffers would be sent at every call for nothing: the first process never takes those of others, and
    # dense weights that fade are buffers.
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
    )


def total(value: Tensor) -> Tensor:
    """The sum of a number over all processes."""
    if count() > 1:
        dist.all_reduce(value)
    return value


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first: running statistics differ with what each has seen."""
    if count() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def decided(device: torch.device, decide: Callable[[], Sequence[int]]) -> list[int]:
    """Numbers that the first process finds, in all of them; they are sent by way of the device.

    Raises:
        RuntimeError: in the others, where the first one fails.
    """
    if count() == 1:
        return list(decide())
    failure: Exception | None = None
    found: Sequence[int] = []
    if place() == 0:
        try:
            found = decide()
        except Exception as error:  # noqa: BLE001 - raised below, once the others have heard of it
            failure = error
    many = torch.tensor([len(found) if failure is None else -1], device=device)
    dist.broadcast(many, 0)
    if failure is not None:
        raise failure
    if int(many) < 0:
        raise RuntimeError("the first process failed; its own message says why")
    values = torch.zeros(int(many), dtype=torch.int64, device=device)
    if place() == 0:
        values.copy_(torch.tensor(found))
    if len(values):
        dist.broadcast(values, 0)
    return [int(value) for value in values.tolist()]


def told(device: torch.device, flag: bool) -> bool:
    """What the first process says, in all of them; it is sent by way of the device."""
    if count() == 1:
        return flag
    said = torch.tensor(flag, device=device)
    dist.broadcast(said, 0)
    return bool(said)


def first_alone(device: torch.device, act: Callable[[], None]) -> None:
    """Let the first process do something that the others wait for.

    Raises:
        RuntimeError: in the others, where the first one fails.
    """

    def acted() -> list[int]:
        act()
        return []

    decided(device, acted)
