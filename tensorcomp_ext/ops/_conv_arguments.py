"""Geometry and argument checks of two-dimensional bottleneck convolutions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

_NAME = "tucker2_conv2d"

IntOrPair = int | Sequence[int]


class Geometry(NamedTuple):
    """Stride, padding (top, bottom, left, right) and dilation of a two-dimensional convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the output for an input of ``size`` (rows, columns)."""
        (step_y, step_x), (top, bottom, left, right), (gap_y, gap_x) = self
        rows = (size[0] + top + bottom - gap_y * (kernel[0] - 1) - 1) // step_y + 1
        columns = (size[1] + left + right - gap_x * (kernel[1] - 1) - 1) // step_x + 1
        return rows, columns


def _ints(value: object, argument: str, expected: str) -> tuple[int, ...]:
    try:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(operator.index(v) for v in value)
        return (operator.index(value),)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{_NAME}: {argument} must be {expected}, got {value!r}") from None


def _pair(value: IntOrPair, argument: str, least: int) -> tuple[int, int]:
    if type(value) is int and value >= least:
        return value, value
    if type(value) is tuple and len(value) == 2:
        first, second = value
        if type(first) is int and type(second) is int and first >= least and second >= least:
            return value
    expected = f"an int or a pair of ints >= {least}"
    pair = _ints(value, argument, expected)
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or any(v < least for v in pair):
        raise ValueError(f"{_NAME}: {argument} must be {expected}, got {value}")
    return pair[0], pair[1]


def resolve_geometry(
    kernel: Sequence[int], stride: IntOrPair, padding: IntOrPair | str, dilation: IntOrPair
) -> Geometry:
    """Bring the accepted spellings of stride, padding and dilation into one form.

    Raises:
        ValueError: a value out of range, or ``padding="same"`` with a stride above 1.
    """
    strides, dilations = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    if isinstance(padding, str):
        if padding == "valid":
            return Geometry(strides, (0, 0, 0, 0), dilations)
        if padding != "same":
            raise ValueError(f"{_NAME}: padding must be ints, 'same' or 'valid', got {padding!r}")
        if strides != (1, 1):
            raise ValueError(f"{_NAME}: padding='same' needs stride 1, got stride {strides}")
        total = [dilations[d] * (kernel[d] - 1) for d in (0, 1)]
        top, left = total[0] // 2, total[1] // 2
        return Geometry(strides, (top, total[0] - top, left, total[1] - left), dilations)
    if type(padding) is not int and isinstance(padding, Sequence) and len(padding) == 4:
        top, bottom, left, right = _ints(padding, "padding", "four ints >= 0")
        if min(top, bottom, left, right) < 0:
            raise ValueError(f"{_NAME}: padding must be >= 0, got {padding}")
        return Geometry(strides, (top, bottom, left, right), dilations)
    rows, columns = _pair(padding, "padding", 0)
    return Geometry(strides, (rows, rows, columns, columns), dilations)


def check_tensor(value: Tensor, argument: str, dims: int, letters: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_NAME}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dim() != dims:
        raise ValueError(f"{_NAME}: {argument} must be {letters}, got {list(value.shape)}")


def check_arguments(
    x: Tensor, core: Tensor, factor_out: Tensor, factor_in: Tensor, bias: Tensor | None, geometry: Geometry
) -> None:
    """Raise ``ValueError`` or ``TypeError`` naming the argument, what was expected and what was given."""
    # Every call pays for these checks: a shape is asked for once.
    check_tensor(x, "x", 4, "[N, C_in, H, W]")
    check_factors(core, factor_out, factor_in, bias)
    _, c_in, *size = x.shape
    if c_in != factor_in.shape[0]:
        raise ValueError(
            f"{_NAME}: factor_in must be [C_in, R_in] with C_in = {c_in}, got {list(factor_in.shape)}"
        )
    dtype, device = x.dtype, x.device
    for value, argument in (
        (core, "core"),
        (factor_out, "factor_out"),
        (factor_in, "factor_in"),
        (bias, "bias"),
    ):
        if value is None:
            continue
        if value.dtype != dtype:
            raise TypeError(f"{_NAME}: {argument} must have x's dtype {dtype}, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{_NAME}: {argument} must be on x's device {device}, got {value.device}")
    if not dtype.is_floating_point:
        raise TypeError(f"{_NAME}: x must be of a floating dtype, got {dtype}")
    kernel = core.shape[2:]
    rows, columns = geometry.output_size(size, kernel)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"{_NAME}: the padded input {size} is smaller than the dilated kernel "
            f"{list(kernel)} (padding {geometry.padding}, dilation {geometry.dilation})"
        )


def check_factors(core: Tensor, factor_out: Tensor, factor_in: Tensor, bias: Tensor | None) -> None:
    check_tensor(core, "core", 4, "[R_out, R_in, kH, kW]")
    check_tensor(factor_out, "factor_out", 2, "[C_out, R_out]")
    check_tensor(factor_in, "factor_in", 2, "[C_in, R_in]")
    shape = core.shape
    if 0 in shape:
        raise ValueError(f"{_NAME}: core must be [R_out, R_in, kH, kW] with no empty mode, got {list(shape)}")
    c_out, rank_out = factor_out.shape
    if rank_out != shape[0]:
        raise ValueError(
            f"{_NAME}: factor_out must be [C_out, R_out] with R_out = {shape[0]}, "
            f"got {list(factor_out.shape)}"
        )
    if factor_in.shape[1] != shape[1]:
        raise ValueError(
            f"{_NAME}: factor_in must be [C_in, R_in] with R_in = {shape[1]}, got {list(factor_in.shape)}"
        )
    if bias is not None:
        check_tensor(bias, "bias", 1, "[C_out]")
        if bias.shape[0] != c_out:
            raise ValueError(f"{_NAME}: bias must be [C_out] with C_out = {c_out}, got {list(bias.shape)}")
