"""Bottleneck convolution, what Tucker-2, CP and tensor-ring convolutions lower to.

The native libraries serve CPU float32 and bfloat16 (``csrc/ops/bottleneck_conv.cpp``) and CUDA float32,
float16 and bfloat16 (``csrc/ops/cuda``); the oracle serves the rest, and :func:`native_support` says why.
A problem without a ring and with a full core is a Tucker-2 convolution and runs as one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._native import Support
from . import _cuda, tucker2_conv
from ._conv_arguments import Geometry, IntOrPair, check_arguments, check_tensor, resolve_geometry
from ._conv_autograd import conv_autograd
from ._conv_defaults import default_backward, default_forward, fake_backward, fake_forward
from ._cuda import convolution_tf32
from ._register import (
    define,
    fallthrough_autograd,
    register_autocast,
    register_autograd,
    register_default,
)
from ._transforms import transformed
from ._tucker2_conv_autograd import AUTOGRAD as _TUCKER2
from .bottleneck_packed import bind_packed_bottleneck, bottleneck_geometry, pack_bottleneck

__all__ = [
    "bind_packed_bottleneck",
    "bottleneck_conv2d",
    "bottleneck_geometry",
    "differentiable_bottleneck",
    "native_support",
    "pack_bottleneck",
    "run",
]

_NAME = "bottleneck_conv2d"
_OPS = torch.ops.tensorcomp
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch.is_autocast_enabled

SCHEMAS = {
    "bottleneck_conv2d": "(Tensor x, Tensor core, Tensor factor_out, Tensor factor_in, Tensor? bias=None, "
    "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int ring=1, bool depthwise=False, "
    "bool allow_tf32=False) -> Tensor",
    "bottleneck_conv2d_backward": "(Tensor grad, Tensor x, Tensor core, Tensor factor_out, "
    "Tensor factor_in, int[2] stride, int[2] padding, int[2] dilation, int output_mask, int ring=1, "
    "bool depthwise=False, bool allow_tf32=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}

for _op, _schema in SCHEMAS.items():
    define(_op, _schema)
_AUTOGRAD = conv_autograd(_NAME, reference.bottleneck_conv2d, plain=(1, False))
differentiable_bottleneck = _AUTOGRAD.differentiable


def native_support(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    ring: int = 1,
    depthwise: bool = False,
) -> Support:
    """Whether a native kernel takes this problem, and the reason when it does not."""
    if x.is_cuda:
        return _cuda.bottleneck_support(x, core, stride, dilation, ring, depthwise)
    # Of the CPU, and of devices without a kernel: what the core is like makes no difference there.
    return tucker2_conv.native_support(x, core, factor_out, factor_in, bias, stride, padding, dilation, _NAME)


def bottleneck_conv2d(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    ring: int = 1,
    depthwise: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Pointwise convolution into rank space, spatial core, pointwise convolution out of it.

    ``y[n,t] = bias[t] + sum_qb factor_out[t,qB+b] conv2d(u[n,q], core)[b]`` with
    ``u[n,q,a] = sum_s factor_in[s,qA+a] x[n,s]``, ``q < ring``. The core is the same for every ring index;
    ``ring=1`` is the Tucker-2 convolution. In bfloat16, odd ranks of a ring are padded with zeros: an
    infinity may come out as NaN.

    Args:
        x: input ``[N, C_in, H, W]``, contiguous, channels-last or any strides.
        core: ``[B, A, kH, kW]``; depthwise ``[R, 1, kH, kW]``.
        factor_out: ``[C_out, ring B]``; depthwise ``[C_out, R]``.
        factor_in: ``[C_in, ring A]``; depthwise ``[C_in, R]``.
        bias: ``[C_out]`` or None.
        stride, dilation: int or pair.
        padding: int, pair, four ints (top, bottom, left, right), "same" or "valid".
        ring: number of ring indices, 1 where ``depthwise``.
        depthwise: ``core[r, 0]`` convolves rank r by itself, as in CP convolutions.
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[N, C_out, H', W']`` in the memory format of ``x``.

    Cost: ``N (H W C_in ring A + H' W' ring B (kH kW A + C_out))`` MACs; depthwise
    ``N R (H W C_in + H' W' (kH kW + C_out))``.

    Raises:
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Kim et al. 2016 (Tucker-2), Lebedev et al. 2015 (CP), Wang et al. 2018 (tensor ring).
    """
    depthwise = bool(depthwise)
    ring = _checked_ring(ring, depthwise)
    check_tensor(core, "core", 4, "[R, 1, kH, kW]" if depthwise else "[R_out, R_in, kH, kW]", _NAME)
    geometry = resolve_geometry(core.shape[2:], stride, padding, dilation, _NAME)
    check_arguments(x, core, factor_out, factor_in, bias, geometry, _NAME, ring, depthwise)
    return run(_NAME, x, core, factor_out, factor_in, bias, geometry, ring, depthwise, backend)


def _checked_ring(ring: int, depthwise: bool) -> int:
    try:
        count = operator.index(ring)
    except TypeError:
        raise TypeError(f"{_NAME}: ring must be an int >= 1, got {ring!r}") from None
    if count < 1:
        raise ValueError(f"{_NAME}: ring must be an int >= 1, got {ring}")
    if depthwise and count != 1:
        raise ValueError(f"{_NAME}: ring must be 1 where depthwise=True, got {ring}")
    return count


def run(
    name: str,
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    ring: int,
    depthwise: bool,
    backend: str | None,
) -> Tensor:
    """The convolution of arguments that fit, by ``backend``; errors name the op ``name``."""
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{name}: backend must be None, 'native' or 'reference', got {backend!r}")
    form: tuple[Any, ...] = (ring, depthwise)
    tensors = (x, core, factor_out, factor_in, bias)
    if backend != "reference":
        support = native_support(*tensors, *geometry, *form)
        if support.ok:
            op: Any = _OPS.bottleneck_conv2d.default
            autograd = _AUTOGRAD
            if form == (1, False):
                op, autograd, form = _OPS.tucker2_conv2d.default, _TUCKER2, ()
            options = form if x.is_cpu else (*form, convolution_tf32(x))
            if _is_compiling():
                return op(*tensors, *geometry, *options)
            if not transformed():
                if _is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
                    return op(*tensors, *geometry, *options)
                return autograd.native(*tensors, geometry, options)
            if backend is None:
                return reference.bottleneck_conv2d(*tensors, *geometry, ring, depthwise)
            support = Support(False, "function transforms and forward-mode AD go to the reference")
        if backend == "native":
            raise ValueError(f"{name}: backend='native' cannot serve: {support.reason}")
    return _oracle(*tensors, *geometry, ring, depthwise)


# --- registration ---

_oracle = default_forward(reference.bottleneck_conv2d, 2)


def _form(ring: int = 1, depthwise: bool = False, allow_tf32: bool = False) -> tuple[int, bool]:
    """Ring and depthwise out of the options."""
    return ring, depthwise


register_default(_NAME, _oracle, fake_forward(_NAME, _form))
register_default(f"{_NAME}_backward", default_backward(_AUTOGRAD.gradients), fake_backward)
register_autograd(_NAME, _AUTOGRAD.kernel)
register_autocast(_NAME, tensors=5)
fallthrough_autograd(f"{_NAME}_backward")
