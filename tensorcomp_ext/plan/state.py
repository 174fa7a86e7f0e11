"""Weights prepared for inference, and how a layer knows that they are stale."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..formats import Format
from ..formats.base import PLAIN
from .geometry import Bound
from .precision import autocast_off

_BOUND_LIMIT = 256
_version, _pointer = attrgetter("_version"), Tensor.data_ptr
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
    """Prepared weights and bound calls for one state of a weight.

    A state is told by the identity and version counter of each tensor the weight is made of, their data
    pointers, and the count of fused optimizer steps. The pointers cannot be reused by other memory while the
    state lives, because ``aliases`` keeps the storages. Writes through ``Tensor.data`` move no version
    counter and stay unseen until ``train()``, ``eval()``, ``to()`` or ``clear_cache()``.

    While a CUDA graph is captured nothing is kept: weights made there lie in the graph's own memory and have
    no values before its first replay.
    """

    __slots__ = (
        "aliases",
        "bound",
        "device",
        "factors",
        "fused_steps",
        "others",
        "parameters",
        "pointers",
        "versions",
        "weight",
        "weights",
    )

    def __init__(self, weight: Format) -> None:
        """The tables that ``weight`` has now are asked again by :meth:`fresh`."""
        self.weight = weight
        self.parameters, *self.others = [table for table, _ in weight.tables()]
        self.factors: list[Any] = [*self.parameters.values(), *_all(self.others)]
        self.versions, self.pointers = [*map(_version, self.factors)], [*map(_pointer, self.factors)]
        self.fused_steps = _fused_steps[0]
        self.aliases = tuple(f.detach() for f in self.factors)
        self.device = next((f.device for f in self.factors), torch.device("cpu"))
        self.bound: dict[tuple[Any, ...], Bound] = {}
        self.weights: dict[tuple[str, torch.dtype], tuple[Tensor, ...]] = {}

    @classmethod
    def of(cls, weight: Format) -> Prepared | None:
        """The state of ``weight`` as it is now; None where a change could not be noticed.

        Parametrized and pruned tensors are computed anew at every call; inference tensors count no versions.
        """
        for table, names in weight.tables():
            held: dict[str, Any] = table
            plain = {name for name, t in held.items() if type(t) in PLAIN and not t.is_inference()}
            if plain != set(names) or len(plain) < len(held):
                return None
        return cls(weight)

    def fresh(self, weight: object) -> bool:
        """Whether ``weight`` and its factors are still those this state was made from."""
        # Every call pays for this, in a network with nothing of it in a cache: loops inside the
        # interpreter's own functions, and no object touched that need not be.
        factors = self.factors
        held: Any = self.parameters.values()
        if self.others:
            if any(a is not b for a, b in zip(self.others, _others(self.weight), strict=True)):
                return False
            held = [*held, *_all(self.others)]
        return (
            weight is self.weight
            and self.fused_steps == _fused_steps[0]
            and len(held) == len(factors)
            and all(map(is_, held, factors))
            and [*map(_version, factors)] == self.versions
            and [*map(_pointer, factors)] == self.pointers
        )

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


def _others(weight: Format) -> list[Any]:
    """The tables beside the first, of a weight that holds another one or buffers."""
    return [table for table, _ in weight.tables()[1:]]


def _all(tables: list[dict[str, Tensor | None]]) -> chain[Tensor | None]:
    return chain.from_iterable(table.values() for table in tables)
