"""Geometry and argument checks of two-dimensional bottleneck convolutions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

_NAME = "tucker2_conv2d"
"""The op that messages name unless another asks."""

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


def _ints(value: object, argument: str, expected: str, name: str) -> tuple[int, ...]:
    try:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(operator.index(v) for v in value)
        return (operator.index(value),)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: {argument} must be {expected}, got {value!r}") from None


def _pair(value: IntOrPair, argument: str, least: int, name: str) -> tuple[int, int]:
    if type(value) is int and value >= least:
        return value, value
    if type(value) is tuple and len(value) == 2:
        first, second = value
        if type(first) is int and type(second) is int and first >= least and second >= least:
            return value
    expected = f"an int or a pair of ints >= {least}"
    pair = _ints(value, argument, expected, name)
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or any(v < least for v in pair):
        raise ValueError(f"{name}: {argument} must be {expected}, got {value}")
    return pair[0], pair[1]


def resolve_geometry(
    kernel: Sequence[int],
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
    name: str = _NAME,
) -> Geometry:
    """Bring the accepted spellings of stride, padding and dilation into one form.

    Raises:
        ValueError: a value out of range, or ``padding="same"`` with a stride above 1.
    """
    strides, dilations = _pair(stride, "stride", 1, name), _pair(dilation, "dilation", 1, name)
    if isinstance(padding, str):
        if padding == "valid":
            return Geometry(strides, (0, 0, 0, 0), dilations)
        if padding != "same":
            raise ValueError(f"{name}: padding must be ints, 'same' or 'valid', got {padding!r}")
        if strides != (1, 1):
            raise ValueError(f"{name}: padding='same' needs stride 1, got stride {strides}")
        total = [dilations[d] * (kernel[d] - 1) for d in (0, 1)]
        top, left = total[0] // 2, total[1] // 2
        return Geometry(strides, (top, total[0] - top, left, total[1] - left), dilations)
    if type(padding) is not int and isinstance(padding, Sequence) and len(padding) == 4:
        top, bottom, left, right = _ints(padding, "padding", "four ints >= 0", name)
        if min(top, bottom, left, right) < 0:
            raise ValueError(f"{name}: padding must be >= 0, got {padding}")
        return Geometry(strides, (top, bottom, left, right), dilations)
    rows, columns = _pair(padding, "padding", 0, name)
    return Geometry(strides, (rows, rows, columns, columns), dilations)


def check_tensor(value: Tensor, argument: str, dims: int, letters: str, name: str = _NAME) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dim() != dims:
        raise ValueError(f"{name}: {argument} must be {letters}, got {list(value.shape)}")


def check_arguments(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    name: str = _NAME,
    ring: int = 1,
    depthwise: bool = False,
) -> None:
    """Raise ``ValueError`` or ``TypeError`` naming the argument, what was expected and what was given."""
    # Every call pays for these checks: a shape is asked for once.
    check_tensor(x, "x", 4, "[N, C_in, H, W]", name)
    check_factors(core, factor_out, factor_in, bias, name, ring, depthwise)
    _, c_in, *size = x.shape
    if c_in != factor_in.shape[0]:
        form = _forms(ring, depthwise)[2]
        raise ValueError(f"{name}: factor_in must be {form} with C_in = {c_in}, got {list(factor_in.shape)}")
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
            raise TypeError(f"{name}: {argument} must have x's dtype {dtype}, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name}: {argument} must be on x's device {device}, got {value.device}")
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: x must be of a floating dtype, got {dtype}")
    kernel = core.shape[2:]
    rows, columns = geometry.output_size(size, kernel)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"{name}: the padded input {size} is smaller than the dilated kernel "
            f"{list(kernel)} (padding {geometry.padding}, dilation {geometry.dilation})"
        )


def check_factors(
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None,
    name: str = _NAME,
    ring: int = 1,
    depthwise: bool = False,
) -> None:
    """What :func:`check_arguments` asks of the weights alone; ``ring`` and ``depthwise`` as in the op."""
    forms = _PLAIN_FORMS if ring == 1 and not depthwise else _forms(ring, depthwise)
    check_tensor(core, "core", 4, forms[0], name)
    check_tensor(factor_out, "factor_out", 2, forms[1], name)
    check_tensor(factor_in, "factor_in", 2, forms[2], name)
    shape = core.shape
    if 0 in shape or (depthwise and shape[1] != 1):
        raise ValueError(f"{name}: core must be {forms[0]} with no empty mode, got {list(shape)}")
    c_out, rank_out = factor_out.shape
    wanted = shape[0] * ring
    if rank_out != wanted:
        ranks = _ranks("R_out", ring, depthwise)
        raise ValueError(
            f"{name}: factor_out must be {forms[1]} with {ranks} = {wanted}, got {list(factor_out.shape)}"
        )
    wanted = shape[0] if depthwise else shape[1] * ring
    if factor_in.shape[1] != wanted:
        ranks = _ranks("R_in", ring, depthwise)
        raise ValueError(
            f"{name}: factor_in must be {forms[2]} with {ranks} = {wanted}, got {list(factor_in.shape)}"
        )
    if bias is not None:
        check_tensor(bias, "bias", 1, "[C_out]", name)
        if bias.shape[0] != c_out:
            raise ValueError(f"{name}: bias must be [C_out] with C_out = {c_out}, got {list(bias.shape)}")


def _ranks(rank: str, ring: int, depthwise: bool) -> str:
    """How messages call the columns of a factor."""
    return "R" if depthwise else rank if ring == 1 else f"ring {rank}"


def _forms(ring: int, depthwise: bool) -> tuple[str, str, str]:
    """How messages call the shapes of core, factor_out and factor_in."""
    return (
        "[R, 1, kH, kW]" if depthwise else "[R_out, R_in, kH, kW]",
        f"[C_out, {_ranks('R_out', ring, depthwise)}]",
        f"[C_in, {_ranks('R_in', ring, depthwise)}]",
    )


_PLAIN_FORMS = _forms(1, False)
