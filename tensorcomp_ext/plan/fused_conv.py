"""Bottleneck convolutions by ``ops.tucker2_conv2d``, for the plan ``fused``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import Support, tucker2_conv2d
from ..ops._tucker2_conv_autograd import differentiable_conv2d
from ..ops.tucker2_conv import bind_packed
from .base import Plan, Stage
from .case import Case, autocast_dtype
from .geometry import Bound, FoldedBound
from .layer import PlannedLayer
from .packed_bottleneck import bind_bottleneck
from .parts import (
    RECOMPUTED,
    conv_parts,
    conv_support,
    fused_stage,
    in_autocast_dtype,
    is_bottleneck,
    packed_conv,
    parameter_names,
)
from .rebuild import part_stages
from .training import TrainingCall


class FusedConv(Plan):
    """The three stages of a two-dimensional bottleneck convolution in one kernel."""

    def serves(self, layer: PlannedLayer) -> bool:
        return is_bottleneck(layer)

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        return conv_support(layer, case)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        width = min(conv_parts(layer).form.core.shape[:2])
        return [*part_stages(layer, case), fused_stage("fused", layer, case, width)]

    def backward_factor(self, layer: PlannedLayer) -> float:
        return RECOMPUTED

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        form, (stride, padding, dilation) = conv_parts(layer)
        x, *factors, bias = in_autocast_dtype(x, form.core, form.point_out, form.point_in, layer.bias)
        core, point_out, point_in = factors
        return tucker2_conv2d(x, core, point_out, point_in, bias, stride, padding, dilation)

    def bind_training(self, layer: PlannedLayer, case: Case) -> TrainingCall:
        form, windows = conv_parts(layer)
        names = parameter_names(layer, (form.core, form.point_out, form.point_in))
        if names is None:
            return self.run
        low = autocast_dtype(case.device) and case.torch_dtype
        core, point_out, point_in = names

        def call(layer: PlannedLayer, x: Tensor) -> Tensor:
            factors: dict[str, Any] = layer._modules["weight"]._parameters  # type: ignore[union-attr]
            bias: Any = layer._parameters["bias"]
            tensors = (x, factors[core], factors[point_out], factors[point_in], bias)
            if low is not None:
                tensors = tuple(None if t is None else t.to(low) for t in tensors)  # type: ignore[assignment]
            return differentiable_conv2d(*tensors, windows)

        return call

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        return bind_packed(*packed_conv(layer, case))

    def bind_folded(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound | None:
        return bind_bottleneck(layer, case, relu) if case.device == "cpu" else None
