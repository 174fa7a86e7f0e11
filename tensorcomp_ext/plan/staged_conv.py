"""Bottleneck convolutions by three library convolutions, for the plan ``staged``."""

from __future__ import annotations

import math

from torch import Tensor

from ..formats import BottleneckConv
from .base import Plan, Stage
from .case import Case
from .channels_last import channels_product, laid_out, takes_products, weight_layout
from .geometry import Bound, Geometry
from .layer import PlannedLayer
from .rebuild import part_stages

RING_TRAINED = 4.8
"""Work of a training call over that of a forward one as it is predicted, of a ring on a CPU: for many narrow
convolutions the library takes longer than for wide ones, in backward most of all. Measured where
``fused_bottleneck`` says."""


class StagedConv(Plan):
    """Pointwise, core, pointwise; ring indices lie side by side in the batch, a depthwise core has groups.

    For channels-last images on CUDA the two pointwise convolutions are matrix products over their memory.
    """

    def serves(self, layer: PlannedLayer) -> bool:
        return isinstance(layer.weight.lower(), BottleneckConv)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        form, geometry = _form(layer), layer.geometry
        output = geometry.output_shape(case.shape, layer.weight.shape)
        before, after = geometry.positions(case.shape), geometry.positions(output)
        u, core, v = form.point_in, form.core, form.point_out
        inner_in, inner_out = before * u.shape[1], after * v.shape[1]
        kind = "depthwise" if form.depthwise else "conv"
        macs, moved = after * form.ring * core.numel(), inner_in + core.numel() + inner_out
        if form.ring > 1 and case.layout == "channels_last":
            moved += 2 * (inner_in + inner_out)  # ring indices are brought into the batch and back
        return [
            *part_stages(layer, case),
            Stage(
                "pointwise", before * u.numel(), min(u.shape), math.prod(case.shape) + u.numel() + inner_in
            ),
            Stage(kind, macs, core.shape[0] if form.depthwise else min(core.shape[:2]), moved),
            Stage("pointwise", after * v.numel(), min(v.shape), inner_out + v.numel() + math.prod(output)),
        ]

    def backward_factor(self, layer: PlannedLayer) -> float:
        form = _form(layer)
        narrow = form.ring > 1 and form.core.device.type == "cpu"
        return RING_TRAINED if narrow else super().backward_factor(layer)

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        form, geometry = _form(layer), layer.geometry
        z = geometry.pointwise(x, form.point_in.t())  # [N, ring A, H, W]
        v = _core(geometry, z, form.core, form.ring, form.depthwise)  # [N, ring B, H', W']
        return geometry.pointwise(v, form.point_out, layer.bias)  # [N, T, H', W']

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        dtype, geometry, form = case.torch_dtype, layer.geometry, _form(layer)
        pointwise, ring, depthwise = geometry.pointwise, form.ring, form.depthwise
        layout = weight_layout(case)

        def make() -> tuple[Tensor, ...]:
            parts = (form.point_in.t(), form.core, form.point_out)
            return tuple(laid_out(p.detach().to(dtype).contiguous(), layout) for p in parts)

        first, core, last = layer.prepared(f"staged {layout}", dtype, make)
        if takes_products(case):

            def products(x: Tensor, bias: Tensor | None) -> Tensor:
                z = _core(geometry, channels_product(x, first), core, ring, depthwise)
                return channels_product(z, last, bias)

            return products
        if ring == 1 and not depthwise:
            apply = geometry.apply
            return lambda x, bias: pointwise(apply(pointwise(x, first), core), last, bias)
        return lambda x, bias: pointwise(
            _core(geometry, pointwise(x, first), core, ring, depthwise), last, bias
        )


def _core(geometry: Geometry, z: Tensor, core: Tensor, ring: int, depthwise: bool) -> Tensor:
    """The spatial convolution in rank space."""
    if depthwise:
        return geometry.apply(z, core, None, core.shape[0])
    if ring == 1:
        return geometry.apply(z, core)
    if _is_channels_last(z):
        return _ring_channels_last(geometry, z, core, ring)
    batch, inner = z.shape[0], core.shape[1]
    # Sizes in full: of an empty batch none could be inferred.
    y = geometry.apply(z.reshape(batch * ring, inner, *z.shape[2:]), core)
    return y.reshape(batch, ring * core.shape[0], *y.shape[2:])


def _ring_channels_last(geometry: Geometry, z: Tensor, core: Tensor, ring: int) -> Tensor:
    """The same for channels-last images, whose result is one as well."""
    batch, sizes, (inner_out, inner) = z.shape[0], z.shape[2:], core.shape[:2]
    # Contiguous also where a view would do, of one image or one channel: the library asks for it.
    parts = z.movedim(1, -1).reshape(batch, *sizes, ring, inner).movedim(-2, 1).contiguous()
    y = geometry.apply(parts.reshape(batch * ring, *sizes, inner).movedim(-1, 1), core)
    sizes = y.shape[2:]
    whole = y.movedim(1, -1).reshape(batch, ring, *sizes, inner_out).movedim(1, -2).contiguous()
    return whole.reshape(batch, *sizes, ring * inner_out).movedim(-1, 1)


def _is_channels_last(z: Tensor) -> bool:
    """Told by strides, which tensors have also in traces and transforms."""
    return z.dim() > 3 and z.stride(1) == 1 and not z.is_contiguous()


def _form(layer: PlannedLayer) -> BottleneckConv:
    form = layer.weight.lower()
    assert isinstance(form, BottleneckConv)
    return form
