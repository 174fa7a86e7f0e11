"""Two-factor linear layers by ``ops.two_factor_linear``, for the plan ``fused``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..formats import TwoFactor
from ..ops import Support, two_factor_linear
from ..ops.chain import Program, Step, bind_packed_chain
from ..ops.two_factor_linear import (
    bind_packed_pair,
    differentiable_two_factor,
    native_support,
    pack_two_factor,
    two_factor_sizes,
)
from .base import Plan, Stage
from .case import Case, autocast_dtype
from .geometry import Bound, FoldedBound, LinearGeometry
from .layer import PlannedLayer
from .parts import CHAINED, fused_stage, in_autocast_dtype, parameter_names
from .training import TrainingCall


def _form(layer: PlannedLayer) -> TwoFactor:
    form = layer.weight.lower()
    assert isinstance(form, TwoFactor)
    return form


class FusedPair(Plan):
    """Both products of a two-factor linear layer in one kernel."""

    def serves(self, layer: PlannedLayer) -> bool:
        return isinstance(layer.geometry, LinearGeometry) and isinstance(layer.weight.lower(), TwoFactor)

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        form = _form(layer)
        probe = form.b.new_empty((0, case.shape[-1]), dtype=case.torch_dtype)
        return native_support(probe, form.a, form.b)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        return [fused_stage("pair", layer, case, _form(layer).a.shape[1])]

    def backward_factor(self, layer: PlannedLayer) -> float:
        return CHAINED

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        form = _form(layer)
        x, a, b, bias = in_autocast_dtype(x, form.a, form.b, layer.bias)
        return two_factor_linear(x, a, b, bias)

    def bind_training(self, layer: PlannedLayer, case: Case) -> TrainingCall:
        form = _form(layer)
        names = parameter_names(layer, (form.a, form.b))
        if names is None:
            return self.run
        low = autocast_dtype(case.device) and case.torch_dtype
        a, b = names

        def call(layer: PlannedLayer, x: Tensor) -> Tensor:
            factors: dict[str, Any] = layer._modules["weight"]._parameters  # type: ignore[union-attr]
            tensors: Any = (x, factors[a], factors[b], layer._parameters["bias"])
            if low is not None:
                tensors = tuple(None if t is None else t.to(low) for t in tensors)
            return differentiable_two_factor(*tensors)

        return call

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        form = _form(layer)
        return bind_packed_pair(_packed(layer, case), two_factor_sizes(form.a, form.b, case.tf32))

    def bind_folded(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound | None:
        if case.device != "cpu":
            return None
        a, b = _form(layer).a, _form(layer).b
        steps = tuple(Step((0,), (factor.shape[0],), (0,)) for factor in (b, a))
        # On the CPU packed factors are the packed chain of both.
        return bind_packed_chain(_packed(layer, case), Program((b.shape[1],), steps), relu=relu)


def _packed(layer: PlannedLayer, case: Case) -> Tensor:
    """Both factors as the kernel reads them, kept with the layer."""
    form, dtype = _form(layer), case.torch_dtype
    (packed,) = layer.prepared("fused", dtype, lambda: (pack_two_factor(form.a.to(dtype), form.b.to(dtype)),))
    return packed
