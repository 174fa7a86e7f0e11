"""Training calls bound for one kind of input, and how a layer knows that they still fit."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .layer import PlannedLayer

TrainingCall = Callable[["PlannedLayer", Tensor], Tensor]
"""A plan ready for training calls with one kind of input: ``(layer, x) -> y``, factors read at each call."""

_form = attrgetter("shape", "dtype", "device")


class Trained:
    """A training call, and what the weight and the bias looked like when a checked call went through.

    Values are none of its business: it holds no tensor.
    """

    __slots__ = ("call", "forms", "tables", "weight")

    def __init__(self, call: TrainingCall, layer: PlannedLayer) -> None:
        self.call = call
        self.weight, self.tables = layer.weight, [table for table, _ in layer.weight.tables()]
        tensors = [*(t for table in self.tables for t in table.values()), layer._parameters["bias"]]
        self.forms = [_form(t) for t in tensors if t is not None]

    def fits(self, layer: PlannedLayer, x: Tensor) -> bool:
        """Whether a call with ``x`` asks for gradients and meets a weight and a bias of the same form.

        Parametrized and pruned factors have left their tables, so that they never fit.
        """
        parameters = layer._parameters
        if "bias" not in parameters or layer._modules["weight"] is not self.weight:
            return False
        tensors = [t for table in self.tables for t in table.values() if t is not None]
        if (bias := parameters["bias"]) is not None:
            tensors.append(bias)
        if not x.requires_grad:
            for tensor in tensors:
                if tensor.requires_grad:
                    break
            else:
                return False
        return [*map(_form, tensors)] == self.forms
