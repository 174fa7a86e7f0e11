"""Tucker-2 convolution: registration of forward and backward, autocast and the public function.

The native libraries serve CPU float32 and bfloat16 (``csrc/ops/tucker2_conv.cpp``) and CUDA float32,
float16 and bfloat16 (``csrc/ops/cuda``); whatever they cannot take goes to the oracle, and
:func:`native_support` says why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, reference
from .._native import Support
from . import _cuda
from ._conv_arguments import Geometry, IntOrPair, check_arguments, check_tensor, resolve_geometry
from ._conv_defaults import default_backward, default_forward, fake_backward, fake_forward
from ._cuda import convolution_tf32
from ._register import fallthrough_autograd, register_autocast, register_autograd, register_default
from ._transforms import transformed
from ._tucker2_conv_autograd import AUTOGRAD, SCHEMAS, native_conv2d
from .tucker2_packed import SCHEMAS as _PACKED_SCHEMAS
from .tucker2_packed import bind_packed, bind_tail, pack_tucker2, packed_geometry, tucker2_conv2d_packed

__all__ = [
    "Geometry",
    "bind_packed",
    "bind_tail",
    "native_support",
    "pack_tucker2",
    "packed_geometry",
    "resolve_geometry",
    "tucker2_conv2d",
    "tucker2_conv2d_packed",
]

_NAME = "tucker2_conv2d"
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_OPS = torch.ops.tensorcomp
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch.is_autocast_enabled


def native_support(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    name: str = _NAME,
) -> Support:
    """Whether the native kernel takes this problem, and the reason when it does not."""
    if x.is_cpu:
        loaded = _native.status()
        if loaded.ok and x.dtype not in _NATIVE_DTYPES:
            return Support(False, f"the native CPU kernel takes float32 and bfloat16, not {x.dtype}")
        return loaded
    if x.is_cuda:
        return _cuda.bottleneck_support(x, core, stride, dilation)
    return Support(False, f"there is no native {name} for device {x.device.type!r}")


def tucker2_conv2d(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Two-dimensional convolution with a Tucker-2 weight, fused into one pass.

    ``W[t,s,y,x] = sum_ab factor_out[t,b] core[b,a,y,x] factor_in[s,a]``; the result equals
    ``torch.nn.functional.conv2d(x, W, bias, stride, padding, dilation)``. The rank-space activations are
    never stored whole: forward keeps a few rows of them in cache, backward computes them again. Inside
    ``torch.func`` transforms and forward-mode differentiation the reference computes, from torch operations.
    On CUDA an infinity may come out as NaN: ranks are padded with zeros, and float32 is split in two parts.

    Args:
        x: input ``[N, C_in, H, W]``, contiguous, channels-last or any strides; native code takes float32 and
            bfloat16, on CUDA float16 too. CUDA float32 is rounded to TF32 only where
            ``torch.backends.cudnn`` allows it.
        core: ``[R_out, R_in, kH, kW]``.
        factor_out: ``[C_out, R_out]``.
        factor_in: ``[C_in, R_in]``.
        bias: ``[C_out]`` or None.
        stride, dilation: int or pair.
        padding: int, pair, four ints (top, bottom, left, right), "same" or "valid".
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[N, C_out, H', W']`` in the memory format of ``x``.

    Cost: ``N (H W C_in R_in + H' W' (kH kW R_in R_out + R_out C_out))`` MACs.

    Raises:
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Tucker 1966; Kim et al. 2016.
    """
    check_tensor(core, "core", 4, "[R_out, R_in, kH, kW]")
    geometry = resolve_geometry(core.shape[2:], stride, padding, dilation)
    check_arguments(x, core, factor_out, factor_in, bias, geometry)
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{_NAME}: backend must be None, 'native' or 'reference', got {backend!r}")
    if backend != "reference":
        support = native_support(x, core, factor_out, factor_in, bias, *geometry)
        if support.ok:
            if _is_compiling():
                tf32 = convolution_tf32(x)
                return _OPS.tucker2_conv2d.default(x, core, factor_out, factor_in, bias, *geometry, tf32)
            if not transformed():
                if x.is_cpu:
                    # The schema's default serves: what the call does not hand over costs nothing.
                    options: tuple[bool, ...] = ()
                    autocast = _is_autocast_enabled("cpu")
                else:
                    options = (convolution_tf32(x),)
                    autocast = _is_autocast_enabled(x.device.type)
                if autocast:
                    op = _OPS.tucker2_conv2d.default
                    return op(x, core, factor_out, factor_in, bias, *geometry, *options)
                return native_conv2d(x, core, factor_out, factor_in, bias, geometry, options)
            if backend is None:
                return reference.tucker2_conv2d(x, core, factor_out, factor_in, bias, *geometry)
            support = Support(False, "function transforms and forward-mode AD go to the reference")
        if backend == "native":
            raise ValueError(f"{_NAME}: backend='native' cannot serve: {support.reason}")
    return _forward(x, core, factor_out, factor_in, bias, *geometry)


# --- registration ---

_SCHEMAS = SCHEMAS | _PACKED_SCHEMAS
"""Also written in ``csrc/ops``, so that a C++ process has them; a test compares the two."""

_forward = default_forward(reference.tucker2_conv2d, 0)
register_default("tucker2_conv2d", _forward, fake_forward("tucker2_conv2d", lambda *options: (1, False)))
register_default("tucker2_conv2d_backward", default_backward(AUTOGRAD.gradients), fake_backward)
register_autograd("tucker2_conv2d", AUTOGRAD.kernel)
register_autocast("tucker2_conv2d", tensors=5)
fallthrough_autograd("tucker2_conv2d_backward")
