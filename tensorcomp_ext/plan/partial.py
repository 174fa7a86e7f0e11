"""The first pointwise stage by the library, core and last pointwise stage by the package's own kernel."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import Support
from ..ops.tucker2_conv import bind_tail
from .base import Plan, Stage, get_plan, register_plan
from .case import Case
from .channels_last import channels_product, takes_products
from .geometry import Bound
from .layer import PlannedLayer
from .parts import conv_parts, conv_support, is_bottleneck, packed_conv

_ALIGNED = 8
"""Columns to which rank space is padded, so that each pixel begins at 16 bytes or more in every dtype."""


@register_plan("partial")
class Partial(Plan):
    """Bottleneck convolutions on CUDA whose ranks are too large for the fused kernel to pay: inference only.

    The fused kernel computes the first stage again for the pixels round each tile; here the library computes
    it once, at the price of writing and reading the rank-space activations. Where gradients, a transform or
    torch.compile look on, the library's stages run.
    """

    own_kernels: ClassVar[bool] = True

    def serves(self, layer: PlannedLayer) -> bool:
        return is_bottleneck(layer)

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        if case.device != "cuda":
            return Support(False, f"for CUDA devices only, not for {case.device!r}")
        if case.training:
            return Support(False, "for inference only: the op that starts from rank space has no gradients")
        return conv_support(layer, case)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        form, geometry = conv_parts(layer).form, layer.geometry
        u, core, v = form.point_in, form.core, form.point_out
        output = geometry.output_shape(case.shape, layer.weight.shape)
        before, after = geometry.positions(case.shape), geometry.positions(output)
        inner = before * core.shape[1]
        weights = core.numel() + v.numel()
        return [
            Stage("pointwise", before * u.numel(), min(u.shape), math.prod(case.shape) + u.numel() + inner),
            Stage("partial", after * weights, min(core.shape[:2]), inner + weights + math.prod(output)),
        ]

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        return get_plan("staged").run(layer, x)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        point_in, dtype = conv_parts(layer).form.point_in, case.torch_dtype
        tail = bind_tail(*packed_conv(layer, case))
        rank = point_in.shape[1]
        (first,) = layer.prepared("partial", dtype, lambda: (_padded(point_in.detach().t().to(dtype)),))
        if takes_products(case):

            def call(x: Tensor, bias: Tensor | None) -> Tensor:
                return tail(channels_product(x, first)[:, :rank], bias)

            return call
        kernel = first[:, :, None, None]
        if case.layout == "channels_last":
            kernel = kernel.contiguous(memory_format=torch.channels_last)
        return lambda x, bias: tail(F.conv2d(x, kernel)[:, :rank], bias)


def _padded(matrix: Tensor) -> Tensor:
    """``matrix`` with rows of zeros up to a multiple of ``_ALIGNED``, contiguous."""
    return F.pad(matrix, (0, 0, 0, -matrix.shape[0] % _ALIGNED)).contiguous()
