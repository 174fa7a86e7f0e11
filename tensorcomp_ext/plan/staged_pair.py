"""Two-factor linear layers by two library products, for the plan ``staged``."""

from __future__ import annotations

import math

from torch import Tensor

from ..formats import TwoFactor
from .base import Plan, Stage
from .case import Case
from .geometry import Bound
from .layer import PlannedLayer


class StagedPair(Plan):
    """One product for each factor."""

    def serves(self, layer: PlannedLayer) -> bool:
        return isinstance(layer.weight.lower(), TwoFactor)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        form, geometry = _form(layer), layer.geometry
        output = geometry.output_shape(case.shape, layer.weight.shape)
        rows, rank, a, b = geometry.positions(case.shape), form.a.shape[1], form.a, form.b
        moved = math.prod(case.shape) + b.numel() + rows * rank
        return [
            Stage("linear", rows * b.numel(), min(b.shape), moved),
            Stage("linear", rows * a.numel(), min(a.shape), rows * rank + a.numel() + math.prod(output)),
        ]

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        form, pointwise = _form(layer), layer.geometry.pointwise
        return pointwise(pointwise(x, form.b), form.a, layer.bias)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        form, dtype, pointwise = _form(layer), case.torch_dtype, layer.geometry.pointwise
        b, a = layer.prepared("staged", dtype, lambda: (form.b.detach().to(dtype), form.a.detach().to(dtype)))
        return lambda x, bias: pointwise(pointwise(x, b), a, bias)


def _form(layer: PlannedLayer) -> TwoFactor:
    form = layer.weight.lower()
    assert isinstance(form, TwoFactor)
    return form
