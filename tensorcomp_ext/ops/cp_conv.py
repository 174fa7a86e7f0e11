"""CP convolution: a bottleneck convolution whose core is depthwise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._conv_arguments import IntOrPair, check_arguments, check_tensor, resolve_geometry
from ._register import define, register_autocast, register_composite
from .bottleneck_conv import run

_NAME = "cp_conv2d"
_LETTERS = ("[C_out, R]", "[C_in, R]", "[kH, R]", "[kW, R]")


def cp_conv2d(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Two-dimensional convolution with a CP weight.

    ``W[t,s,y,x] = sum_r factors[0][t,r] factors[1][s,r] factors[2][y,r] factors[3][x,r]``; the result equals
    ``torch.nn.functional.conv2d(x, W, bias, stride, padding, dilation)``. The two spatial factors are
    multiplied to one depthwise core.

    Args:
        x: input ``[N, C_in, H, W]``, any strides.
        factors: ``[C_out, R]``, ``[C_in, R]``, ``[kH, R]`` and ``[kW, R]``.
        bias: ``[C_out]`` or None.
        stride, dilation: int or pair.
        padding: int, pair, four ints (top, bottom, left, right), "same" or "valid".
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[N, C_out, H', W']`` in the memory format of ``x``.

    Cost: ``N R (H W C_in + H' W' (kH kW + C_out))`` MACs.

    Raises:
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Hitchcock 1927; Lebedev et al. 2015 (convolutions).
    """
    _check_factors(factors, x)
    out, into, rows, columns = factors
    core = (rows.t()[:, :, None] * columns.t()[:, None, :]).unsqueeze(1)  # [R, 1, kH, kW]
    geometry = resolve_geometry(core.shape[2:], stride, padding, dilation, _NAME)
    check_arguments(x, core, out, into, bias, geometry, _NAME, depthwise=True)
    return run(_NAME, x, core, out, into, bias, geometry, 1, True, backend)


def _check_factors(factors: Sequence[Tensor], x: Tensor) -> None:
    check_tensor(x, "x", 4, "[N, C_in, H, W]", _NAME)
    if not isinstance(factors, (list, tuple)):
        raise TypeError(f"{_NAME}: factors must be a list of four tensors, got {type(factors).__name__}")
    if len(factors) != 4:
        raise ValueError(f"{_NAME}: factors must be a list of four tensors, got {len(factors)}")
    for index, (factor, letters) in enumerate(zip(factors, _LETTERS, strict=True)):
        argument = f"factors[{index}]"
        check_tensor(factor, argument, 2, letters, _NAME)
        rank = factors[0].shape[1]
        if factor.shape[1] != rank or rank == 0:
            wanted = f"R = {rank}" if rank else "R >= 1"
            raise ValueError(f"{_NAME}: {argument} must be {letters} with {wanted}, got {list(factor.shape)}")
        if index > 1 and factor.shape[0] == 0:
            raise ValueError(
                f"{_NAME}: {argument} must be {letters} with no empty mode, got {list(factor.shape)}"
            )
        if index == 1 and factor.shape[0] != x.shape[1]:
            raise ValueError(
                f"{_NAME}: {argument} must be {letters} with C_in = {x.shape[1]}, got {list(factor.shape)}"
            )
        if factor.dtype != x.dtype:
            raise TypeError(f"{_NAME}: {argument} must have x's dtype {x.dtype}, got {factor.dtype}")
        if factor.device != x.device:
            raise ValueError(f"{_NAME}: {argument} must be on x's device {x.device}, got {factor.device}")


# --- registration ---

SCHEMAS = {
    "cp_conv2d": "(Tensor x, Tensor[] factors, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
    "int[2] dilation=1) -> Tensor",
}

define(_NAME, SCHEMAS[_NAME])
register_composite(_NAME, cp_conv2d)
register_autocast(_NAME, tensors=3)
