"""The package's own kernel: all stages in one pass over the input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..formats import BottleneckConv
from ..ops import Support, tucker2_conv2d
from ..ops._tucker2_conv_autograd import differentiable_conv2d
from ..ops.tucker2_conv import bind_packed, native_support, pack_tucker2, packed_geometry, resolve_geometry
from .base import Plan, Stage, register_plan
from .case import Case, autocast_dtype
from .geometry import Bound, ConvGeometry
from .layer import PlannedLayer
from .training import TrainingCall


@register_plan("fused")
class Fused(Plan):
    """Two-dimensional bottleneck convolutions by ``ops.tucker2_conv2d``; inference packs weights once."""

    def serves(self, layer: PlannedLayer) -> bool:
        return layer.geometry.spatial == 2 and isinstance(layer.weight.lower(), BottleneckConv)

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        form, (stride, padding, dilation) = self._parts(layer)
        # An empty batch carries device, dtype and sizes without memory.
        probe = form.core.new_empty((0, *case.shape[1:]), dtype=case.torch_dtype)
        return native_support(
            probe, form.core, form.point_out, form.point_in, None, stride, padding, dilation
        )

    @staticmethod
    def _parts(
        layer: PlannedLayer,
    ) -> tuple[BottleneckConv, tuple[tuple[int, ...], tuple[int, ...] | str, tuple[int, ...]]]:
        form, geometry = layer.weight.lower(), layer.geometry
        if not isinstance(form, BottleneckConv) or not isinstance(geometry, ConvGeometry):
            raise TypeError(f"plan 'fused' serves bottleneck convolutions, got {type(layer).__name__}")
        return form, (geometry.stride, geometry.padding, geometry.dilation)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        output = layer.geometry.output_shape(case.shape, layer.weight.shape)
        macs = layer.weight.macs(layer.geometry.positions(case.shape), layer.geometry.positions(output))
        moved = math.prod(case.shape) + layer.weight.numel + math.prod(output)
        return [Stage("fused", macs, min(self._parts(layer)[0].core.shape[:2]), moved)]

    def backward_factor(self) -> float:
        return 4.0  # the rank-space activations are computed again in backward

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        form, (stride, padding, dilation) = self._parts(layer)
        tensors = (x, form.core, form.point_out, form.point_in)
        bias: Tensor | None = layer.bias
        dtype = autocast_dtype(x.device.type)
        if dtype is not None and x.dtype != torch.float64:
            # An input that an earlier layer left in the autocast dtype meets factors of another.
            tensors = (x.to(dtype), form.core.to(dtype), form.point_out.to(dtype), form.point_in.to(dtype))
            bias = None if bias is None else bias.to(dtype)
        return tucker2_conv2d(*tensors, bias, stride, padding, dilation)

    def bind_training(self, layer: PlannedLayer, case: Case) -> TrainingCall:
        form, (stride, padding, dilation) = self._parts(layer)
        parts = (form.core, form.point_out, form.point_in)
        names = [name for part in parts for name, p in layer.weight._parameters.items() if p is part]
        if len(names) < len(parts) or "bias" not in layer._parameters:
            return self.run  # something is computed from other parameters, at each call
        geometry = resolve_geometry(form.core.shape[2:], stride, padding, dilation)
        low = autocast_dtype(case.device) and case.torch_dtype
        core, point_out, point_in = names

        def call(layer: PlannedLayer, x: Tensor) -> Tensor:
            factors: dict[str, Any] = layer._modules["weight"]._parameters  # type: ignore[union-attr]
            bias: Any = layer._parameters["bias"]
            tensors = (x, factors[core], factors[point_out], factors[point_in], bias)
            if low is not None:
                tensors = tuple(None if t is None else t.to(low) for t in tensors)  # type: ignore[assignment]
            return differentiable_conv2d(*tensors, geometry)

        return call

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        form, (stride, padding, dilation) = self._parts(layer)
        dtype, core = case.torch_dtype, form.core
        geometry = resolve_geometry(core.shape[2:], stride, padding, dilation)
        (packed,) = layer.prepared(
            "fused",
            dtype,
            lambda: (pack_tucker2(core.to(dtype), form.point_out.to(dtype), form.point_in.to(dtype)),),
        )
        numbers = packed_geometry(core.shape, form.point_in.shape[0], form.point_out.shape[0], geometry)
        return bind_packed(packed, numbers)
