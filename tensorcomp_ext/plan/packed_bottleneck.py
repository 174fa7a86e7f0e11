"""Bottleneck convolutions for inference on the CPU, what follows them in the network in the same pass."""

from __future__ import annotations

from torch import Tensor

from ..ops.bottleneck_packed import bind_packed_bottleneck, bottleneck_geometry, pack_bottleneck
from .case import Case
from .geometry import FoldedBound
from .layer import PlannedLayer
from .parts import conv_parts


def bind_bottleneck(layer: PlannedLayer, case: Case, relu: bool = False) -> FoldedBound:
    """The native kernel with weights packed once, as a function of x, bias and residual; any ring or core."""
    form, windows = conv_parts(layer)
    dtype = case.torch_dtype

    def make() -> tuple[Tensor, ...]:
        core, point_out, point_in = (p.detach().to(dtype) for p in (form.core, form.point_out, form.point_in))
        return (pack_bottleneck(core, point_out, point_in, form.ring, form.depthwise),)

    (packed,) = layer.prepared("fused bottleneck", dtype, make)
    c_in, c_out = form.point_in.shape[0], form.point_out.shape[0]
    geometry = bottleneck_geometry(form.core.shape, c_in, c_out, windows, form.ring, form.depthwise)
    return bind_packed_bottleneck(packed, geometry, relu)
