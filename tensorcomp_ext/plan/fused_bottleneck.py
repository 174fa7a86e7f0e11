"""Bottleneck convolutions with a ring or a depthwise core by ``ops.bottleneck_conv2d``, for ``fused``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import BottleneckConv
from ..ops import Support, bottleneck_conv2d
from ..ops._cuda import convolution_tf32
from ..ops.bottleneck_conv import native_support
from .base import Plan, Stage
from .case import Case
from .geometry import Bound, FoldedBound
from .layer import PlannedLayer
from .packed_bottleneck import bind_bottleneck
from .parts import RECOMPUTED, conv_parts, fused_stage, in_autocast_dtype, is_plain
from .rebuild import part_stages

RINGED = 2.8
"""Work of a training call over that of a forward one as it is predicted, of a ring on a CPU: measured on
convolutions of LeNet-5 and of ResNets for small images, at ranks 5 to 15."""

_OPS = torch.ops.tensorcomp


class FusedBottleneck(Plan):
    """The three stages of a CP or tensor-ring convolution in one kernel."""

    def serves(self, layer: PlannedLayer) -> bool:
        form = layer.weight.lower()
        return layer.geometry.spatial == 2 and isinstance(form, BottleneckConv) and not is_plain(form)

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        form, windows = conv_parts(layer)
        # An empty batch carries device, dtype and sizes without memory.
        probe = form.core.new_empty((0, *case.shape[1:]), dtype=case.torch_dtype)
        tensors = (probe, form.core, form.point_out, form.point_in, None)
        return native_support(*tensors, *windows, form.ring, form.depthwise)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        form = conv_parts(layer).form
        width = form.core.shape[0] if form.depthwise else min(form.core.shape[:2])
        return [*part_stages(layer, case), fused_stage("fused", layer, case, width)]

    def backward_factor(self, layer: PlannedLayer) -> float:
        form = conv_parts(layer).form
        return RINGED if form.ring > 1 and form.core.device.type == "cpu" else RECOMPUTED

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        form, (stride, padding, dilation) = conv_parts(layer)
        x, core, point_out, point_in, bias = in_autocast_dtype(
            x, form.core, form.point_out, form.point_in, layer.bias
        )
        return bottleneck_conv2d(
            x, core, point_out, point_in, bias, stride, padding, dilation, form.ring, form.depthwise
        )

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        if case.device == "cpu":
            call: Callable[..., Tensor] = bind_bottleneck(layer, case)
            return call
        form, windows = conv_parts(layer)
        dtype, form_of = case.torch_dtype, (form.ring, form.depthwise)

        def make() -> tuple[Tensor, ...]:
            return tuple(
                p.detach().to(dtype).contiguous() for p in (form.core, form.point_out, form.point_in)
            )

        parts = layer.prepared("fused parts", dtype, make)
        op, below_autograd = _OPS.bottleneck_conv2d.default, torch._C._AutoDispatchBelowAutograd

        def call_unpacked(x: Tensor, bias: Tensor | None) -> Tensor:
            with below_autograd():
                y: Tensor = op(x, *parts, bias, *windows, *form_of, convolution_tf32(x))
                return y

        return call_unpacked

    def bind_folded(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound | None:
        return bind_bottleneck(layer, case, relu) if case.device == "cpu" else None
