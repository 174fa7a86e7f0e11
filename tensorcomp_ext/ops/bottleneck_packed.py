"""Bottleneck convolutions for inference on the CPU: packed weights, residual and ReLU in the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .. import _native
from ._conv_arguments import Geometry, check_factors
from ._conv_defaults import new_image
from ._register import define, fallthrough_autograd, refuse_transforms, register_default

_OPS = torch.ops.tensorcomp

PackedBottleneck = Callable[..., Tensor]
"""``(x, bias, residual=None) -> y``"""


def pack_bottleneck(
    core: Tensor, factor_out: Tensor, factor_in: Tensor, ring: int = 1, depthwise: bool = False
) -> Tensor:
    """Copy the three weights once into the order the native kernel reads; for :func:`bind_packed_bottleneck`.

    Returns an opaque one-dimensional tensor, valid for the instruction set in use now.

    Args:
        core, factor_out, factor_in, ring, depthwise: as in :func:`~tensorcomp_ext.ops.bottleneck_conv2d`.

    Raises:
        ValueError, TypeError: as :func:`~tensorcomp_ext.ops.bottleneck_conv2d`.
        RuntimeError: there is no native code for the device or the dtype.
    """
    check_factors(core, factor_out, factor_in, None, "bottleneck_conv2d", ring, depthwise)
    op = _OPS.bottleneck_conv2d_pack.default
    packed: Tensor = op(core.detach(), factor_out.detach(), factor_in.detach(), ring, depthwise)
    return packed


def bottleneck_geometry(
    core_shape: Sequence[int],
    c_in: int,
    c_out: int,
    geometry: Geometry,
    ring: int = 1,
    depthwise: bool = False,
) -> list[int]:
    """The integers that ``torch.ops.tensorcomp.bottleneck_conv2d_packed`` takes beside its tensors.

    Sixteen: the core's shape, ``c_in``, ``c_out``, stride (2), padding (top, bottom, left, right),
    dilation (2), ``ring`` and ``depthwise``.
    """
    windows = (*geometry.stride, *geometry.padding, *geometry.dilation)
    return [*core_shape, c_in, c_out, *windows, ring, int(depthwise)]


def bind_packed_bottleneck(packed: Tensor, geometry: list[int], relu: bool = False) -> PackedBottleneck:
    """The op of packed weights as a function ``(x, bias, residual=None) -> y``, for calls no transform sees.

    ``y = conv(x) + bias + residual``, then negative values become zero where ``relu``. The residual
    ``[N, C_out, H', W']`` is read as y is stored; where it lies in memory otherwise than y, which has the
    memory format of x, it is copied first. Not differentiable.

    Args:
        packed: from :func:`pack_bottleneck`.
        geometry: from :func:`bottleneck_geometry`.

    Raises (when called):
        RuntimeError: sizes or dtypes that do not fit, or ``packed`` was made for another instruction set.
    """
    op = _OPS.bottleneck_conv2d_packed.default
    below_autograd = torch._C._AutoDispatchBelowAutograd

    def call(x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        with below_autograd():
            y: Tensor = op(x, packed, bias, residual, geometry, relu)
            return y

    return call


# --- registration ---

SCHEMAS = {
    "bottleneck_conv2d_pack": "(Tensor core, Tensor factor_out, Tensor factor_in, int ring, bool depthwise) "
    "-> Tensor",
    "bottleneck_conv2d_packed": "(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int[] geometry, "
    "bool relu) -> Tensor",
}
"""Also written in ``csrc/ops``."""


def _reason(device: torch.device) -> str:
    if device.type != "cpu":
        return f"for CPU tensors only, got device {device.type!r}"
    return _native.status().reason or "this op has no packed form on the CPU"


def _pack_without_native(
    core: Tensor, factor_out: Tensor, factor_in: Tensor, ring: int, depthwise: bool
) -> NoReturn:
    raise RuntimeError(f"bottleneck_conv2d_pack: {_reason(core.device)}")


def _packed_without_native(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: list[int], relu: bool
) -> NoReturn:
    raise RuntimeError(f"bottleneck_conv2d_packed: {_reason(x.device)}")


def _fake_packed(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: list[int], relu: bool
) -> Tensor:
    top, bottom, left, right = geometry[8:12]
    windows = Geometry((geometry[6], geometry[7]), (top, bottom, left, right), (geometry[12], geometry[13]))
    return new_image(x, geometry[5], windows.output_size(x.shape[2:], geometry[2:4]))


for _op, _schema in SCHEMAS.items():
    define(_op, _schema)
register_default("bottleneck_conv2d_pack", _pack_without_native, None)
register_default("bottleneck_conv2d_packed", _packed_without_native, _fake_packed)
fallthrough_autograd("bottleneck_conv2d_pack")
refuse_transforms("bottleneck_conv2d_packed", instead="bottleneck_conv2d")
