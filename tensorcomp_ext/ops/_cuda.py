"""What the ops ask about CUDA: the problems its kernels take, and whether float32 may be rounded to TF32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._native import Support
from ._conv_arguments import IntOrPair, resolve_geometry

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of the CUDA kernels."""

_is_compiling = torch.compiler.is_compiling
_float32 = torch.float32
_precision_of = torch._C._get_fp32_precision_getter


def convolution_tf32(x: Tensor) -> bool:
    """Whether torch lets convolutions of ``x`` round to TF32: CUDA float32 only, False for all else.

    Follows ``torch.backends.cudnn.conv.fp32_precision`` and with it ``torch.backends.cudnn.allow_tf32``.
    """
    if not x.is_cuda or x.dtype != _float32:
        return False
    if _is_compiling():
        return torch.backends.cudnn.allow_tf32  # what torch.compile can trace
    return bool(_precision_of("cuda", "conv") == "tf32")


def matmul_tf32(x: Tensor) -> bool:
    """Whether torch lets matrix products of ``x`` round to TF32: CUDA float32 only, False for all else.

    Follows ``torch.backends.cuda.matmul.fp32_precision`` and with it
    ``torch.backends.cuda.matmul.allow_tf32`` and ``torch.set_float32_matmul_precision``.
    """
    if not x.is_cuda or x.dtype != _float32:
        return False
    if _is_compiling():
        return torch.backends.cuda.matmul.allow_tf32  # what torch.compile can trace
    return bool(_precision_of("cuda", "matmul") == "tf32")


def support(dtype: torch.dtype) -> Support:
    """Whether the CUDA library is loaded and has kernels for ``dtype``, sizes apart."""
    loaded = _native.cuda_status()
    if loaded.ok and dtype not in DTYPES:
        return Support(False, f"the native CUDA kernels take float32, float16 and bfloat16, not {dtype}")
    return loaded


def bottleneck_support(
    x: Tensor,
    core: Tensor,
    stride: IntOrPair,
    dilation: IntOrPair,
    ring: int = 1,
    depthwise: bool = False,
) -> Support:
    """Whether the CUDA kernels take a bottleneck convolution of ``x``, which lies on a CUDA device."""
    loaded = support(x.dtype)
    if not loaded.ok or _is_compiling():
        return loaded  # in a compiled graph the op itself decides by sizes
    rank_out, rank_in, *kernel = core.shape
    strides, _, dilations = resolve_geometry(kernel, stride, 0, dilation)
    return fits_bottleneck(
        rank_out if depthwise else rank_in,
        rank_out,
        ring,
        kernel,
        strides,
        dilations,
        x.element_size(),
        depthwise,
    )


def no_packing(device: torch.device) -> str:
    """Why weights on ``device`` cannot be packed, or packed ones used there."""
    if device.type == "cpu":
        return _native.status().reason or "this op has no packed form on the CPU"
    if device.type == "cuda":
        return _native.cuda_status().reason or "the CUDA library has no packed form of this op"
    return f"packed weights are for CPU and CUDA tensors, not for device {device.type!r}"


def no_cuda_form(device: torch.device) -> str:
    """Why an op that only the CUDA library has does not serve tensors on ``device``."""
    if device.type != "cuda":
        return f"for CUDA tensors only, got device {device.type!r}"
    return _native.cuda_status().reason or "the CUDA library does not have this op"


def fits_bottleneck(
    rank_in: int,
    rank_out: int,
    ring: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    element_size: int,
    depthwise: bool,
) -> Support:
    """Whether the fused CUDA kernel of bottleneck convolutions takes these sizes, and which it does not.

    Args:
        rank_in, rank_out: A and B, the ranks of one ring index; both R where ``depthwise``.
        ring: ring indices that share the core, 1 without a ring.
        kernel, stride, dilation: rows and columns.
        element_size: bytes of an entry, 4 or 2.
        depthwise: whether the core convolves each rank by itself.
    """
    return Support(True)


def fits_two_factor(c_in: int, rank: int, c_out: int, element_size: int) -> Support:
    """Whether the fused CUDA kernel of two-factor products takes these sizes, and which it does not.

    Args:
        c_in, rank, c_out: ``b`` is ``[rank, c_in]``, ``a`` is ``[c_out, rank]``.
        element_size: bytes of an entry, 4 or 2.
    """
    return Support(True)
