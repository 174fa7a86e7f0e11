"""Tensor-ring convolution: a bottleneck convolution whose core all ring indices share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ._conv_arguments import IntOrPair, check_arguments, check_tensor, resolve_geometry
from ._register import define, register_autocast, register_composite
from .bottleneck_conv import run

_NAME = "tr_conv2d"


def tr_conv2d(
    x: Tensor,
    core_in: Tensor,
    core_spatial: Tensor,
    core_out: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    *,
    kernel_size: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Two-dimensional convolution with a tensor-ring weight.

    ``W[t,s,d] = sum_qab core_in[q,s,a] core_spatial[a,d,b] core_out[b,t,q]`` with ``d = y kW + x``; the
    result equals ``torch.nn.functional.conv2d(x, W, bias, stride, padding, dilation)``.

    Args:
        x: input ``[N, C_in, H, W]``, any strides.
        core_in: ``[R0, C_in, Ra]``.
        core_spatial: ``[Ra, kH kW, Rb]``.
        core_out: ``[Rb, C_out, R0]``.
        bias: ``[C_out]`` or None.
        stride, dilation: int or pair.
        padding: int, pair, four ints (top, bottom, left, right), "same" or "valid".
        kernel_size: ``(kH, kW)``; None for a square kernel.
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[N, C_out, H', W']`` in the memory format of ``x``.

    Cost: ``N R0 (H W C_in Ra + H' W' Rb (kH kW Ra + C_out))`` MACs.

    Raises:
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Zhao et al. 2016; Wang et al. 2018 (convolutions).
    """
    _check_cores(x, core_in, core_spatial, core_out)
    ring, _, rank_in = core_in.shape
    rank_out, c_out, _ = core_out.shape
    kernel = _window(core_spatial, kernel_size)
    # Column q A + a of factor_in and column q B + b of factor_out belong to ring index q.
    factor_in = core_in.permute(1, 0, 2).reshape(x.shape[1], ring * rank_in)
    factor_out = core_out.permute(1, 2, 0).reshape(c_out, ring * rank_out)
    core = core_spatial.permute(2, 0, 1).reshape(rank_out, rank_in, *kernel)
    geometry = resolve_geometry(kernel, stride, padding, dilation, _NAME)
    check_arguments(x, core, factor_out, factor_in, bias, geometry, _NAME, ring)
    return run(_NAME, x, core, factor_out, factor_in, bias, geometry, ring, False, backend)


def _check_cores(x: Tensor, core_in: Tensor, core_spatial: Tensor, core_out: Tensor) -> None:
    check_tensor(x, "x", 4, "[N, C_in, H, W]", _NAME)
    cores = (
        (core_in, "core_in", "[R0, C_in, Ra]"),
        (core_spatial, "core_spatial", "[Ra, kH kW, Rb]"),
        (core_out, "core_out", "[Rb, C_out, R0]"),
    )
    for core, argument, letters in cores:
        check_tensor(core, argument, 3, letters, _NAME)
        if 0 in (core.shape if argument == "core_spatial" else core.shape[::2]):
            raise ValueError(
                f"{_NAME}: {argument} must be {letters} with no rank of 0, got {list(core.shape)}"
            )
        if core.dtype != x.dtype:
            raise TypeError(f"{_NAME}: {argument} must have x's dtype {x.dtype}, got {core.dtype}")
        if core.device != x.device:
            raise ValueError(f"{_NAME}: {argument} must be on x's device {x.device}, got {core.device}")
    matches = (
        (cores[0], 1, "C_in", x.shape[1]),
        (cores[1], 0, "Ra", core_in.shape[2]),
        (cores[2], 0, "Rb", core_spatial.shape[2]),
        (cores[2], 2, "R0", core_in.shape[0]),
    )
    for (core, argument, letters), mode, letter, size in matches:
        if core.shape[mode] != size:
            raise ValueError(
                f"{_NAME}: {argument} must be {letters} with {letter} = {size}, got {list(core.shape)}"
            )


def _window(core_spatial: Tensor, kernel_size: Sequence[int] | None) -> tuple[int, int]:
    taps = core_spatial.shape[1]
    if kernel_size is None:
        side = 1  # counted up: torch.compile has no integer square root of a symbol
        while side * side < taps:
            side += 1
        if side * side != taps:
            raise ValueError(
                f"{_NAME}: core_spatial must be [Ra, kH kW, Rb] with a square kH kW unless kernel_size is "
                f"given, got {list(core_spatial.shape)}"
            )
        return side, side
    if not isinstance(kernel_size, Sequence) or any(type(k) is not int for k in kernel_size):
        raise TypeError(f"{_NAME}: kernel_size must be a pair of ints >= 1, got {kernel_size!r}")
    if len(kernel_size) != 2 or min(kernel_size) < 1 or math.prod(kernel_size) != taps:
        raise ValueError(
            f"{_NAME}: kernel_size must be (kH, kW) with kH kW = {taps}, got {tuple(kernel_size)}"
        )
    return kernel_size[0], kernel_size[1]


# --- registration ---

SCHEMAS = {
    "tr_conv2d": "(Tensor x, Tensor core_in, Tensor core_spatial, Tensor core_out, Tensor? bias=None, "
    "int[2] stride=1, int[2] padding=0, int[2] dilation=1, *, int[]? kernel_size=None) -> Tensor",
}

define(_NAME, SCHEMAS[_NAME])
register_composite(_NAME, tr_conv2d)
register_autocast(_NAME, tensors=5)
