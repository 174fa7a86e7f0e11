"""The work by which a machine's rates are measured, in sizes that fill a device and no more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.chain import Program, Step, bind_packed_chain, pack_chain
from ..ops.chain import native_support as chain_support
from ..ops.lowrank_sparse_linear import (
    bind_lowrank_sparse,
    bind_packed_lowrank_sparse,
    lowrank_sparse_sizes,
    pack_lowrank_sparse,
)
from ..ops.lowrank_sparse_linear import native_support as sparse_support
from ..ops.lowrank_sparse_packing import pack_sparse
from ..ops.tucker2_conv import (
    bind_tail,
    native_support,
    pack_tucker2,
    packed_geometry,
    resolve_geometry,
    tucker2_conv2d_packed,
)
from ..ops.two_factor_linear import bind_packed_pair, pack_two_factor, two_factor_sizes
from ..ops.two_factor_linear import native_support as pair_support
from .clock import Call, Clock
from .precision import tf32_state

Work = dict[str, tuple[int, Call]]
"""By kind, the multiply-adds of a call, and the call."""

_SECONDS = 0.012
_SIDE = 28
_NEAR = 1 << 17
"""Bytes of a copy within the cache."""
BUILT = {
    op: torch._C._dispatch_has_kernel_for_dispatch_key(f"tensorcomp::{op}", "CPU")
    for op in ("tucker2_conv2d", "bottleneck_conv2d", "two_factor_linear", "chain", "lowrank_sparse_linear")
}
"""Which ops have a kernel of ours on the CPU: with others, rates are measured anew."""


@dataclass(frozen=True)
class Workload:
    """Calls to be timed on one device in one dtype."""

    host: bool
    """Whether a call returns when its work is done."""
    widths: tuple[int, ...]
    calls: Callable[[int], Work]
    """The work of every kind for a number of channels, or of ranks of twice as many where it is fused."""
    tiny: Call
    """A convolution so small that only the call costs."""
    copy: Call
    copied: int
    """Bytes that ``copy`` reads and writes."""
    copy_near: Call
    """The same within the cache."""
    copied_near: int


def seconds_of(call: Call, clock: Clock) -> float:
    """Least seconds of a call after a warm-up: what the machine reaches when nothing else runs."""
    call()
    samples: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(samples) < 3 or (time.perf_counter() < end and len(samples) < 200):
        samples.append(clock.sample(call))
    return min(samples)


def workload(dtype: torch.dtype, device: str) -> Workload:
    """The work for a device: on the CPU one image, on CUDA batches of equal memory."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    host = torch.device(device).type == "cpu"
    entries = 1 << 22 if host else 1 << 24
    big, target = torch.ones(entries, **options), torch.empty(entries, **options)
    near = _NEAR // big.element_size()
    return Workload(
        host=host,
        # Below 16 channels tensor cores are not filled, and what is measured is memory.
        widths=(8, 32, 128) if host else (16, 64, 256),
        calls=partial(_image_calls if host else _batch_calls, options),
        tiny=partial(F.conv2d, torch.ones(1, 8, 4, 4, **options), torch.ones(8, 8, 3, 3, **options)),
        copy=lambda: target.copy_(big),
        copied=2 * big.numel() * big.element_size(),
        copy_near=lambda: target[:near].copy_(big[:near]),
        copied_near=2 * _NEAR,
    )


def _image_calls(options: dict[str, Any], width: int) -> Work:
    """One small image, as single requests meet it."""
    x = torch.ones(1, width, _SIDE, _SIDE, **options)
    kernel = torch.ones(width, width, 3, 3, **options)
    point = torch.ones(width, width, 1, 1, **options)
    rows, matrix = torch.ones(4096, width, **options), torch.ones(width, width, **options)
    pixels = _SIDE * _SIDE
    calls: Work = {
        "conv": ((_SIDE - 2) ** 2 * kernel.numel(), partial(F.conv2d, x, kernel)),
        "pointwise": (pixels * point.numel(), partial(F.conv2d, x, point)),
        "linear": (4096 * matrix.numel(), partial(F.linear, rows, matrix)),
    }
    outer = torch.ones(2 * width, width, **options)
    wide = _channels_last(torch.ones(1, 2 * width, _SIDE, _SIDE, **options))
    if native_support(wide, kernel, outer, outer):
        packed = pack_tucker2(kernel, outer, outer)
        arguments = (wide, packed, tuple(kernel.shape), 2 * width, None, 1, 1, 1)
        work = pixels * (kernel.numel() + 2 * outer.numel())
        calls["fused"] = (work, partial(tucker2_conv2d_packed, *arguments))
    return calls | _product_calls(options, width, 512) | _sparse_calls(options, width)


def _sparse_calls(options: dict[str, Any], width: int, rows: int = 16) -> Work:
    """A few rows through a packed matrix of eight times the width, a tenth of its entries kept."""
    wide = 8 * width
    a, b = torch.zeros(wide, 1, **options), torch.zeros(1, wide, **options)
    x = torch.ones(rows, wide, **options)
    if not sparse_support(x, a, b):
        return {}
    place = torch.arange(wide, device=options["device"])
    kept = (7 * place[:, None] + 13 * place) % 10 == 0
    sparse = pack_sparse(torch.ones(wide, wide, **options), kept)
    if x.is_cuda:
        call = bind_lowrank_sparse(a, b, *sparse[:3])
    else:
        call = bind_packed_lowrank_sparse(pack_lowrank_sparse(a, b, sparse), lowrank_sparse_sizes(a, b))
    return {"sparse": (rows * sparse.values.shape[0], partial(call, x, None))}


def _product_calls(options: dict[str, Any], width: int, rows: int) -> Work:
    """Chains of products by our kernel: a pair of rank ``width``, and three cores of a train of that rank."""
    wide = 8 * width
    pair = Program((wide,), (Step((0,), (width,), (0,)), Step((0,), (wide,), (0,))))
    # Dims behind those contracted, as the first cores of a train meet them; the rank as wide as two modes.
    steps = (
        Step((0,), (8, width), (1, 2, 0)),
        Step((1, 2), (8, width), (0, 1, 2)),
    )
    train = Program((8, 8), steps)
    calls: Work = {}
    for kind, program, count in (("pair", pair, rows), ("chain", train, max(1, rows // 8))):
        matrices = [torch.ones(shape, **options) for shape in program.matrix_shapes()]
        x = torch.ones(count, program.in_features, **options)
        if chain_support(x, matrices, program):
            call = bind_packed_chain(pack_chain(matrices, program), program)
            calls[kind] = (count * program.macs(), partial(call, x, None))
    return calls


def _batch_calls(options: dict[str, Any], width: int, entries: int = 1 << 23) -> Work:
    """Channels-last batches of as many entries at every width, so that none leaves a GPU idle."""
    images = max(1, entries // (_SIDE * _SIDE * width))
    pixels = images * _SIDE * _SIDE
    x = _channels_last(torch.ones(images, width, _SIDE, _SIDE, **options))
    kernel = torch.ones(width, width, 3, 3, **options)
    matrix = torch.ones(width, width, **options)
    rows = x.movedim(1, -1).reshape(pixels, width)
    product = pixels * matrix.numel()
    calls: Work = {
        "conv": (pixels * kernel.numel(), partial(F.conv2d, x, _channels_last(kernel), padding=1)),
        "pointwise": (product, partial(F.conv2d, x, _channels_last(matrix[:, :, None, None]))),
        "linear": (product, partial(F.linear, rows, matrix)),
    }
    outer = torch.ones(2 * width, width, **options)
    wide = _channels_last(torch.ones(images // 2 or 1, 2 * width, _SIDE, _SIDE, **options))
    narrow = x[: images // 2 or 1]
    pixels = narrow.shape[0] * _SIDE * _SIDE
    allowed = tf32_state("cuda")
    if native_support(wide, kernel, outer, outer):
        packed = pack_tucker2(kernel, outer, outer)
        windows = resolve_geometry(kernel.shape[2:], 1, 1, 1)
        tf32 = allowed.convolutions and x.dtype == torch.float32
        numbers = packed_geometry(kernel.shape, 2 * width, 2 * width, windows, tf32)
        whole = partial(tucker2_conv2d_packed, wide, packed, tuple(kernel.shape), 2 * width, None, 1, 1, 1)
        calls["fused"] = (pixels * (kernel.numel() + 2 * outer.numel()), whole)
        tail = partial(bind_tail(packed, numbers), narrow, None)
        calls["partial"] = (pixels * (kernel.numel() + outer.numel()), tail)
    outward, inward = outer, outer.t().contiguous()
    wide_rows = wide.movedim(1, -1).reshape(pixels, 2 * width)
    if pair_support(wide_rows, outward, inward):
        tf32 = allowed.products and x.dtype == torch.float32
        sizes = two_factor_sizes(outward, inward, tf32)
        pair = partial(bind_packed_pair(pack_two_factor(outward, inward), sizes), wide_rows, None)
        calls["pair"] = (pixels * 2 * outer.numel(), pair)
    products = _product_calls(options, width, max(1, entries // (8 * width)))
    return products | calls | _sparse_calls(options, width)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
