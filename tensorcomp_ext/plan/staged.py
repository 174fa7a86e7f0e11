"""The factors one after another through the library's kernels."""

from __future__ import annotations

import math

from torch import Tensor

from ..formats import BottleneckConv, TwoFactor
from .base import Plan, Stage, register_plan
from .case import Case
from .channels_last import channels_product, laid_out, takes_products, weight_layout
from .embedding import lookup, staged_rows, staged_stages
from .geometry import Bound
from .layer import PlannedLayer
from .parts import is_plain


@register_plan("staged")
class Staged(Plan):
    """Three library convolutions for a bottleneck convolution, two products for a two-factor weight.

    Of an embedding the slices of every index, and batched products of them.

    For channels-last images on CUDA the two pointwise convolutions are matrix products over their memory.
    """

    def serves(self, layer: PlannedLayer) -> bool:
        if lookup(layer) is not None:
            return True
        form = layer.weight.lower()
        return isinstance(form, TwoFactor) or is_plain(form)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        if lookup(layer) is not None:
            return staged_stages(layer, case)
        form, geometry = layer.weight.lower(), layer.geometry
        entries = math.prod(case.shape)
        output = geometry.output_shape(case.shape, layer.weight.shape)
        before, after = geometry.positions(case.shape), geometry.positions(output)
        if not isinstance(form, BottleneckConv):
            assert isinstance(form, TwoFactor)
            rank, a, b = form.a.shape[1], form.a, form.b
            return [
                Stage("linear", before * b.numel(), min(b.shape), entries + b.numel() + before * rank),
                Stage(
                    "linear", after * a.numel(), min(a.shape), after * rank + a.numel() + math.prod(output)
                ),
            ]
        u, core, v = form.point_in, form.core, form.point_out
        rank_out, rank_in = core.shape[:2]
        return [
            Stage("pointwise", before * u.numel(), min(u.shape), entries + u.numel() + before * rank_in),
            Stage(
                "conv",
                after * core.numel(),
                min(rank_out, rank_in),
                before * rank_in + core.numel() + after * rank_out,
            ),
            Stage(
                "pointwise", after * v.numel(), min(v.shape), after * rank_out + v.numel() + math.prod(output)
            ),
        ]

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        if lookup(layer) is not None:
            return staged_rows(layer, x)
        form, geometry = layer.weight.lower(), layer.geometry
        if isinstance(form, BottleneckConv):
            z = geometry.pointwise(x, form.point_in.t())  # [N, R_in, H, W]
            v = geometry.apply(z, form.core)  # [N, R_out, H', W']
            return geometry.pointwise(v, form.point_out, layer.bias)  # [N, T, H', W']
        assert isinstance(form, TwoFactor)
        return geometry.pointwise(geometry.pointwise(x, form.b), form.a, layer.bias)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        if lookup(layer) is not None:
            return lambda x, bias: staged_rows(layer, x)
        dtype, geometry = case.torch_dtype, layer.geometry
        form = layer.weight.lower()
        pointwise = geometry.pointwise
        if isinstance(form, BottleneckConv):
            parts = (form.point_in.t(), form.core, form.point_out)
            layout = weight_layout(case)
            first, core, last = layer.prepared(
                f"staged {layout}",
                dtype,
                lambda: tuple(laid_out(p.detach().to(dtype).contiguous(), layout) for p in parts),
            )
            apply = geometry.apply
            if takes_products(case):
                return lambda x, bias: channels_product(apply(channels_product(x, first), core), last, bias)
            return lambda x, bias: pointwise(apply(pointwise(x, first), core), last, bias)
        assert isinstance(form, TwoFactor)
        b, a = layer.prepared("staged", dtype, lambda: (form.b.detach().to(dtype), form.a.detach().to(dtype)))
        return lambda x, bias: pointwise(pointwise(x, b), a, bias)
