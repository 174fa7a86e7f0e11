"""The dense weight in the order the library's own kernel reads, laid out once instead of at every call."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import Support
from .base import Plan, Stage, get_plan, register_plan
from .case import Case
from .geometry import Bound, ConvGeometry, FoldedBound
from .layer import PlannedLayer
from .precision import autocast_off

_DTYPES = ("float32", "bfloat16")


@register_plan("packed")
class Packed(Plan):
    """Two-dimensional convolutions on the CPU, inference: oneDNN's blocked weight, kept.

    ``torch.nn.Conv2d`` has the weight laid out anew at each call, which for single images of many channels
    takes longer than the convolution. The ops used are those that ``torch.compile`` calls with freezing.
    """

    def serves(self, layer: PlannedLayer) -> bool:
        return layer.geometry.spatial == 2

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        if case.device != "cpu":
            return Support(False, f"for the CPU only, not for {case.device!r}")
        if case.training:
            return Support(False, "for inference only: the weight changes with every step")
        if case.prefer == "memory":
            return Support(False, "prefer='memory': no dense copy of the weight may be kept")
        if case.dtype not in _DTYPES:
            return Support(
                False, f"oneDNN's packed convolution takes {' and '.join(_DTYPES)}, not {case.dtype}"
            )
        if isinstance(layer.geometry, ConvGeometry):
            if layer.geometry.same_is_uneven(layer.weight.shape):
                return Support(False, "padding='same' of an even window pads one side more than the other")
            if layer.geometry.groups != 1:
                return Support(False, f"for one group of channels, not for {layer.geometry.groups}")
        return _available(case.torch_dtype)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        return get_plan("dense").stages(layer, case)[:1]

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        return get_plan("dense").run(layer, x)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        call = self._bind(layer, case, relu=False)
        return lambda x, bias: call(x, bias, None)

    def bind_folded(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound | None:
        return self._bind(layer, case, relu)

    def _bind(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound:
        geometry, dtype = layer.geometry, case.torch_dtype
        assert isinstance(geometry, ConvGeometry)
        padding = geometry.symmetric_padding(layer.weight.shape)
        windows = (padding, list(geometry.stride), list(geometry.dilation), 1)

        def make() -> tuple[Tensor, ...]:
            weight = layer.weight.to_dense().to(dtype)
            return (_packed(weight, *windows, list(case.shape)),)

        # For the first shape that comes; oneDNN takes it for others too, laid out anew where it must be.
        (weight,) = layer.prepared("packed", dtype, make)
        plain, binary = _ops()
        contiguous = case.layout == "contiguous"
        rectified = "relu" if relu else None

        def call(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
            if residual is None:
                y = plain(x, weight, bias, *windows, rectified or "none", [], "")
            else:
                y = binary(x, residual, weight, bias, *windows, "add", None, rectified, [], None)
            # The op answers in channels-last; a convolution, in the layout of its input.
            return y.contiguous() if contiguous else y

        return call


def _packed(
    weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, shape: list[int]
) -> Tensor:
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed: Tensor = reorder(weight.contiguous().to_mkldnn(), padding, stride, dilation, groups, shape)
    return packed


def _ops() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    op: Any = torch.ops.mkldnn._convolution_pointwise
    return op.default, op.binary


@lru_cache(maxsize=len(_DTYPES))
def _available(dtype: torch.dtype) -> Support:
    """Whether this torch has the ops here and they compute what they should: they are no public interface.

    Asked in the middle of a user's call, so that nothing of the user's state is read or moved: no default
    dtype or device, no autocast, no random numbers.
    """
    if not torch.backends.mkldnn.is_available():
        return Support(False, "this torch is built without oneDNN")

    def values(*shape: int) -> Tensor:
        count = math.prod(shape)
        ramp = torch.arange(count, dtype=torch.float32, device="cpu")
        return torch.sin(ramp + count).view(shape).to(dtype)

    windows = ([0, 0], [1, 1], [1, 1], 1)
    try:
        with torch.inference_mode(False), torch.no_grad(), autocast_off("cpu"):
            x, weight, bias = values(1, 3, 5, 5), values(4, 3, 3, 3), values(4)
            residual = values(1, 4, 3, 3)
            plain, binary = _ops()
            packed = _packed(weight, *windows, [1, 3, 5, 5])
            found = plain(x, packed, bias, *windows, "relu", [], "")
            summed = binary(x, residual, packed, bias, *windows, "add", None, "relu", [], None)
            exact = F.conv2d(x.double(), weight.double(), bias.double())
            pairs = ((found, exact.relu()), (summed, (exact + residual.double()).relu()))
            worst = max(float((f.double() - e).norm() / e.norm()) for f, e in pairs)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        return Support(False, f"this torch has not the packed convolution: {str(error).splitlines()[0]}")
    if not worst < (1e-5 if dtype == torch.float32 else 2e-2):
        return Support(False, "the packed convolution of this torch computes something else")
    return Support(True)
