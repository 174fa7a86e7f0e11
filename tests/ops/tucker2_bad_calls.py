"""Calls of the public functions that must be refused, and what each is told.

Run as a program it prints what every call raises, as JSON; a test runs it without native code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

import tensorcomp_ext as tc
from tensorcomp_ext.ops.tucker2_conv import pack_tucker2


def _call(**changes: Any) -> object:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 6, 7, 5),
        "core": torch.zeros(3, 4, 3, 2),
        "factor_out": torch.zeros(8, 3),
        "factor_in": torch.zeros(6, 4),
        "bias": torch.zeros(8),
    }
    return tc.ops.tucker2_conv2d(**(given | changes))


def _zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


_DOUBLE = torch.float64

BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "x of three dims": (
        lambda: _call(x=_zeros(6, 7, 5)),
        ValueError,
        "x must be [N, C_in, H, W], got [6, 7, 5]",
    ),
    "x no tensor": (lambda: _call(x=[[1.0]]), TypeError, "x must be a tensor, got list"),
    "core no tensor": (lambda: _call(core=None), TypeError, "core must be a tensor, got NoneType"),
    "bias no tensor": (lambda: _call(bias=0.5), TypeError, "bias must be a tensor, got float"),
    "core of two dims": (
        lambda: _call(core=_zeros(3, 4)),
        ValueError,
        "core must be [R_out, R_in, kH, kW], got [3, 4]",
    ),
    "rank 0": (
        lambda: _call(core=_zeros(0, 4, 3, 3), factor_out=_zeros(8, 0)),
        ValueError,
        "core must be [R_out, R_in, kH, kW] with no empty mode, got [0, 4, 3, 3]",
    ),
    "empty kernel": (
        lambda: _call(core=_zeros(3, 4, 0, 3)),
        ValueError,
        "core must be [R_out, R_in, kH, kW] with no empty mode, got [3, 4, 0, 3]",
    ),
    "factor_out of one dim": (
        lambda: _call(factor_out=_zeros(8)),
        ValueError,
        "factor_out must be [C_out, R_out], got [8]",
    ),
    "factor_out's rank": (
        lambda: _call(factor_out=_zeros(8, 4)),
        ValueError,
        "factor_out must be [C_out, R_out] with R_out = 3, got [8, 4]",
    ),
    "factor_in's rank": (
        lambda: _call(factor_in=_zeros(6, 3)),
        ValueError,
        "factor_in must be [C_in, R_in] with R_in = 4, got [6, 3]",
    ),
    "factor_in's channels": (
        lambda: _call(factor_in=_zeros(5, 4)),
        ValueError,
        "factor_in must be [C_in, R_in] with C_in = 6, got [5, 4]",
    ),
    "bias's length": (
        lambda: _call(bias=_zeros(7)),
        ValueError,
        "bias must be [C_out] with C_out = 8, got [7]",
    ),
    "bias of two dims": (lambda: _call(bias=_zeros(8, 1)), ValueError, "bias must be [C_out], got [8, 1]"),
    "core's dtype": (
        lambda: _call(core=_zeros(3, 4, 3, 2, dtype=_DOUBLE)),
        TypeError,
        "core must have x's dtype torch.float32, got torch.float64",
    ),
    "bias's dtype": (
        lambda: _call(bias=_zeros(8, dtype=torch.bfloat16)),
        TypeError,
        "bias must have x's dtype torch.float32, got torch.bfloat16",
    ),
    "factor_in's device": (
        lambda: _call(factor_in=_zeros(6, 4, device="meta")),
        ValueError,
        "factor_in must be on x's device cpu, got meta",
    ),
    "integers": (
        lambda: _call(
            x=_zeros(2, 6, 7, 5, dtype=torch.int64),
            core=_zeros(3, 4, 3, 2, dtype=torch.int64),
            factor_out=_zeros(8, 3, dtype=torch.int64),
            factor_in=_zeros(6, 4, dtype=torch.int64),
            bias=None,
        ),
        TypeError,
        "x must be of a floating dtype, got torch.int64",
    ),
    "stride 0": (lambda: _call(stride=0), ValueError, "stride must be an int or a pair of ints >= 1, got 0"),
    "three strides": (
        lambda: _call(stride=(1, 1, 1)),
        ValueError,
        "stride must be an int or a pair of ints >= 1, got (1, 1, 1)",
    ),
    "dilation 0": (
        lambda: _call(dilation=(1, 0)),
        ValueError,
        "dilation must be an int or a pair of ints >= 1, got (1, 0)",
    ),
    "padding below 0": (
        lambda: _call(padding=-1),
        ValueError,
        "padding must be an int or a pair of ints >= 0, got -1",
    ),
    "four paddings below 0": (
        lambda: _call(padding=(0, 0, 0, -1)),
        ValueError,
        "padding must be >= 0, got (0, 0, 0, -1)",
    ),
    "unknown padding": (
        lambda: _call(padding="full"),
        ValueError,
        "padding must be ints, 'same' or 'valid', got 'full'",
    ),
    "same with a stride": (
        lambda: _call(padding="same", stride=2),
        ValueError,
        "padding='same' needs stride 1, got stride (2, 2)",
    ),
    "kernel above the image": (
        lambda: _call(dilation=4),
        ValueError,
        "the padded input [7, 5] is smaller than the dilated kernel [3, 2] "
        "(padding (0, 0, 0, 0), dilation (4, 4))",
    ),
    "unknown backend": (
        lambda: _call(backend="fast"),
        ValueError,
        "backend must be None, 'native' or 'reference', got 'fast'",
    ),
    "packing a rank that does not fit": (
        lambda: pack_tucker2(_zeros(3, 4, 3, 3), _zeros(8, 2), _zeros(6, 4)),
        ValueError,
        "factor_out must be [C_out, R_out] with R_out = 3, got [8, 2]",
    ),
}

# Spellings of a window that are no ints.
NO_INTS: dict[str, Callable[[], object]] = {
    "float padding": lambda: _call(padding=1.5),
    "padding None": lambda: _call(padding=None),
    "text stride": lambda: _call(stride="2"),
    "float strides": lambda: _call(stride=(1.0, 2.0)),
}


def raised(call: Callable[[], object]) -> tuple[str, str]:
    """Type and text of what a call raises."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def everything() -> dict[str, tuple[str, str]]:
    return {name: raised(call) for name, (call, _, _) in BAD_CALLS.items()} | {
        name: raised(call) for name, call in NO_INTS.items()
    }


if __name__ == "__main__":
    print(json.dumps(everything()))
