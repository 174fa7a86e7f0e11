"""What the plans of our own kernels take from a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import BottleneckConv, Form
from ..ops import Support
from ..ops._conv_arguments import Geometry as Windows
from ..ops.tucker2_conv import native_support, pack_tucker2, packed_geometry, resolve_geometry
from .base import Stage
from .case import Case, autocast_dtype
from .geometry import ConvGeometry
from .layer import PlannedLayer

RECOMPUTED = 4.0
"""Work of a training call over that of a forward one where backward computes rank space again."""
CHAINED = 3.2
"""The same of the chain kernel: what it computes again never leaves the cache, where a pass is cheap."""


class ConvParts(NamedTuple):
    """A two-dimensional bottleneck convolution as the ops take it."""

    form: BottleneckConv
    windows: Windows
    """Stride, padding and dilation."""


def is_plain(form: Form) -> bool:
    """Whether this is a bottleneck convolution with a full core that no ring shares."""
    return isinstance(form, BottleneckConv) and form.ring == 1 and not form.depthwise


def is_bottleneck(layer: PlannedLayer) -> bool:
    """Whether the ops of bottleneck convolutions take this type of layer."""
    return layer.geometry.spatial == 2 and is_plain(layer.weight.lower())


def conv_parts(layer: PlannedLayer) -> ConvParts:
    """The parts of a layer that :func:`is_bottleneck`."""
    form, geometry = layer.weight.lower(), layer.geometry
    assert isinstance(form, BottleneckConv) and isinstance(geometry, ConvGeometry)
    windows = resolve_geometry(form.core.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
    return ConvParts(form, windows)


def conv_support(layer: PlannedLayer, case: Case) -> Support:
    """Whether there is a native kernel for the whole convolution, and why not."""
    form, windows = conv_parts(layer)
    # An empty batch carries device, dtype and sizes without memory.
    probe = form.core.new_empty((0, *case.shape[1:]), dtype=case.torch_dtype)
    return native_support(probe, form.core, form.point_out, form.point_in, None, *windows)


def packed_conv(layer: PlannedLayer, case: Case) -> tuple[Tensor, list[int]]:
    """The three weights as one packed tensor, and the integers that go with it."""
    form, windows = conv_parts(layer)
    dtype, core = case.torch_dtype, form.core
    (packed,) = layer.prepared(
        "fused",
        dtype,
        lambda: (pack_tucker2(core.to(dtype), form.point_out.to(dtype), form.point_in.to(dtype)),),
    )
    tf32 = case.tf32 if case.device == "cuda" else None  # the CPU's op takes no such number
    c_in, c_out = form.point_in.shape[0], form.point_out.shape[0]
    return packed, packed_geometry(core.shape, c_in, c_out, windows, tf32)


def fused_stage(kind: str, layer: PlannedLayer, case: Case, width: int) -> Stage:
    """The whole layer in one pass: input, weights and output moved once."""
    geometry, weight = layer.geometry, layer.weight
    output = geometry.output_shape(case.shape, weight.shape)
    macs = weight.macs(geometry.positions(case.shape), geometry.positions(output))
    return Stage(kind, macs, width, math.prod(case.shape) + weight.numel + math.prod(output))


def in_autocast_dtype(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype autocast computes in.

    An input that an earlier layer left in the autocast dtype meets factors of another.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is None or x.dtype == torch.float64:
        return x, *others
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def parameter_names(layer: PlannedLayer, parts: Sequence[Tensor]) -> list[str] | None:
    """Which plain parameters of the weight these are; None where one is computed from others at each call."""
    names = [name for part in parts for name, p in layer.weight._parameters.items() if p is part]
    return names if len(names) == len(parts) and "bias" in layer._parameters else None
