"""Weights prepared for inference, and how a layer knows that they are stale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .geometry import Bound
from .precision import autocast_off

_BOUND_LIMIT = 256
_fused_steps = [0]


def _count_fused_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if any(group.get("fused") for group in optimizer.param_groups):
        _fused_steps[0] += 1


# Optimizers with fused=True write parameters without moving their version counters.
register_optimizer_step_post_hook(_count_fused_step)


def capturing(device: torch.device) -> bool:
    """Whether what is now queued on ``device`` only goes into a CUDA graph, to run when that is replayed."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Prepared:
    """Prepared weights and bound calls for one state of a layer's factors.

    A state is told by each factor's identity, version counter and data pointer, and by the count of fused
    optimizer steps. The pointers cannot be reused by other memory while the state lives, because ``aliases``
    keeps the storages. Writes through ``Tensor.data`` move no version counter and stay unseen until
    ``train()``, ``eval()``, ``to()`` or ``clear_cache()``.

    While a CUDA graph is captured nothing is kept: weights made there lie in the graph's own memory and have
    no values before its first replay.
    """

    __slots__ = ("aliases", "bound", "device", "fused_steps", "snapshot", "weights")

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        self.snapshot = tuple((n, f, f._version, f.data_ptr()) for n, f in factors.items())
        self.fused_steps = _fused_steps[0]
        self.aliases = tuple(f.detach() for f in factors.values())
        self.device = next((f.device for f in factors.values()), torch.device("cpu"))
        self.bound: dict[tuple[Any, ...], Bound] = {}
        self.weights: dict[tuple[str, torch.dtype], tuple[Tensor, ...]] = {}

    def fresh(self, parameters: Mapping[str, Tensor | None]) -> bool:
        """Whether the factors among ``parameters`` are still those this state was made from."""
        if self.fused_steps != _fused_steps[0]:
            return False
        for name, factor, version, pointer in self.snapshot:
            if (
                parameters.get(name) is not factor
                or factor._version != version
                or factor.data_ptr() != pointer
            ):
                return False
        return True

    def keep(self, key: tuple[Any, ...], bound: Bound) -> None:
        """Remember a bound call; shapes that never come back must not grow the table for ever."""
        if capturing(self.device):
            return
        if len(self.bound) >= _BOUND_LIMIT:
            self.bound.clear()
        self.bound[key] = bound

    def prepare(
        self, plan: str, dtype: torch.dtype, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """The plan's weights in ``dtype``, made on first use, and at each use in the capture of a graph."""
        found = self.weights.get((plan, dtype))
        if found is None:
            # Normal tensors whatever the caller's mode: an inference tensor could not meet autograd later.
            with torch.inference_mode(False), torch.no_grad(), autocast_off(self.device.type):
                found = make()
            if not capturing(self.device):
                self.weights[plan, dtype] = found
        return found
