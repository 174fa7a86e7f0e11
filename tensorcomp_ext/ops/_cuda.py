"""What the ops ask about CUDA: the problems its kernels take, and whether float32 may be rounded to TF32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import _native
from .._native import Support
from ._conv_arguments import IntOrPair, resolve_geometry

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of the CUDA kernels."""

_NO_CORE = (0, 0)

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


def support(dtype: torch.dtype, device: torch.device | None = None) -> Support:
    """Whether the CUDA library is loaded and has kernels for ``dtype`` and the device, sizes apart."""
    loaded = _native.cuda_status()
    if loaded.ok and device is not None and torch.cuda.is_available():
        major, minor = _capability(device)
        if major < 8:
            return Support(
                False, f"the native CUDA kernels need compute capability 8.0, the device has {major}.{minor}"
            )
    if loaded.ok and dtype not in DTYPES:
        return Support(False, f"the native CUDA kernels take float32, float16 and bfloat16, not {dtype}")
    return loaded


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def bottleneck_support(
    x: Tensor,
    core: Tensor,
    stride: IntOrPair,
    dilation: IntOrPair,
    ring: int = 1,
    depthwise: bool = False,
) -> Support:
    """Whether the CUDA kernels take a bottleneck convolution of ``x``, which lies on a CUDA device."""
    loaded = support(x.dtype, x.device)
    if not loaded.ok or _is_compiling():
        return loaded  # in a compiled graph the op itself decides by sizes
    rank_out, rank_in, *kernel = core.shape
    strides, _, dilations = resolve_geometry(kernel, stride, 0, dilation)
    return fits_bottleneck(
        x.device,
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
    device: torch.device,
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
    sizes = [rank_in, rank_out, ring, *kernel, *stride, *dilation]
    if not _fits(tuple(sizes), depthwise, element_size, _shared_bytes(device)):
        return Support(
            False,
            f"ranks ({rank_out}, {rank_in}) with kernel {list(kernel)}"
            + (f" and ring {ring}" if ring > 1 else "")
            + " do not fit the shared memory of this device",
        )
    return Support(True)


def fits_two_factor(device: torch.device, rank: int, element_size: int) -> Support:
    """Whether the fused CUDA kernel of two-factor products takes a rank, and why not.

    Args:
        rank: ``b`` is ``[rank, in]``, ``a`` is ``[out, rank]``.
        element_size: bytes of an entry, 4 or 2.
    """
    if not _fits((rank, rank, 1, *_NO_CORE, 1, 1, 1, 1), False, element_size, _shared_bytes(device)):
        return Support(False, f"rank {rank} does not fit the shared memory of this device")
    return Support(True)


def fits_chain(device: torch.device, program: Sequence[int], element_size: int) -> Support:
    """Whether the fused CUDA kernel of chains takes a program, and why not.

    Args:
        program: as the ops take it.
        element_size: bytes of an entry, 4 or 2.
    """
    if not _fits_chain(tuple(program), element_size, _shared_bytes(device)):
        return Support(
            False,
            "the states of one row between the products, with at most 8 products and 8 dims that move apart, "
            "do not fit the shared memory of this device",
        )
    return Support(True)


MOST_EMBEDDING_CORES = 8


def embedding_support(indices: Tensor, cores: Sequence[Tensor]) -> Support:
    """Whether the CUDA kernels take an embedding of these cores, which lie on a CUDA device."""
    loaded = support(cores[0].dtype, indices.device)
    if not loaded.ok or _is_compiling():
        return loaded  # in a compiled graph the op itself decides by sizes
    if len(cores) > MOST_EMBEDDING_CORES:
        return Support(
            False, f"the native CUDA kernel takes up to {MOST_EMBEDDING_CORES} cores, not {len(cores)}"
        )
    sizes = tuple(size for core in cores for size in core.shape)
    if not _fits_embedding(sizes, _shared_bytes(indices.device)):
        return Support(False, "the products of one row's slices do not fit the shared memory of this device")
    return loaded


def sparse_support(x: Tensor, columns: int, rank: int, rows: int) -> Support:
    """Whether the CUDA kernels take ``rows`` rows through a packed matrix and factors of a rank.

    Args:
        x: a tensor of the call's dtype and device.
        columns: of the matrix.
    """
    loaded = support(x.dtype, x.device)
    if not loaded.ok or _is_compiling():
        return loaded  # in a compiled graph the op itself decides by sizes
    most = _fits_sparse(columns, rank, _shared_bytes(x.device))
    if most == 0:
        return Support(
            False, f"{columns} columns and rank {rank} do not fit the shared memory of this device"
        )
    if rows > most:
        return Support(
            False,
            f"the native CUDA kernel is for up to {most} rows, not {rows}: with more of them the dense "
            "weight takes less time",
        )
    return loaded


@lru_cache(maxsize=64)
def _shared_bytes(device: torch.device) -> int:
    """Shared memory a block can have; that of the largest where there is no device to ask (fake tensors)."""
    if not torch.cuda.is_available():
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    # Not in every release of torch; every device of capability 8.0 has this much.
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))


@lru_cache(maxsize=4096)
def _fits(sizes: tuple[int, ...], depthwise: bool, element_size: int, shared_bytes: int) -> bool:
    # Of the CPU library, which is there wherever the CUDA library is.
    return bool(torch.ops.tensorcomp.cuda_fits(sizes, depthwise, element_size, shared_bytes))


@lru_cache(maxsize=4096)
def _fits_chain(program: tuple[int, ...], element_size: int, shared_bytes: int) -> bool:
    return bool(torch.ops.tensorcomp.cuda_fits_chain(program, element_size, shared_bytes))


@lru_cache(maxsize=4096)
def _fits_embedding(sizes: tuple[int, ...], shared_bytes: int) -> bool:
    return bool(torch.ops.tensorcomp.cuda_fits_embedding(sizes, shared_bytes))


@lru_cache(maxsize=4096)
def _fits_sparse(columns: int, rank: int, shared_bytes: int) -> int:
    return int(torch.ops.tensorcomp.cuda_fits_sparse(columns, rank, shared_bytes))
