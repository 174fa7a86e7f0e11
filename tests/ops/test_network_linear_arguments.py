"""What the linear ops of core networks say to arguments that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorcomp_ext.ops import tr_linear, tt_linear, ttm_linear


def zeros(*shapes: tuple[int, ...], **options: Any) -> list[Tensor]:
    return [torch.zeros(shape, **options) for shape in shapes]


def train(function: Callable[..., Tensor] = tt_linear, **changes: Any) -> Tensor:
    given: dict[str, Any] = {
        "x": torch.zeros(7, 6),
        "cores": zeros((1, 4, 2), (2, 2, 3), (3, 3, 1)),
        "bias": torch.zeros(4),
        "in_modes": (2, 3),
        "out_modes": (4,),
    }
    return function(**(given | changes))


def ring(**changes: Any) -> Tensor:
    return train(tr_linear, **({"cores": zeros((2, 4, 2), (2, 2, 3), (3, 3, 2))} | changes))


def matrix(**changes: Any) -> Tensor:
    given: dict[str, Any] = {"x": torch.zeros(7, 6), "cores": zeros((1, 4, 2, 5), (5, 2, 3, 1))}
    return ttm_linear(**(given | changes))


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "x no tensor": (lambda: train(x=[1.0]), TypeError, "tt_linear: x must be a tensor, got list"),
    "x a number": (
        lambda: ring(x=torch.zeros(())),
        ValueError,
        "tr_linear: x must be [..., in] with in = 6, got []",
    ),
    "features": (
        lambda: matrix(x=torch.zeros(7, 5)),
        ValueError,
        "ttm_linear: x must be [..., in] with in = 6, got [7, 5]",
    ),
    "x of integers": (
        lambda: matrix(
            x=torch.zeros(7, 6, dtype=torch.long), cores=zeros((1, 4, 2, 1), (1, 1, 3, 1), dtype=torch.long)
        ),
        TypeError,
        "ttm_linear: x must be of a floating dtype, got torch.int64",
    ),
    "cores no list": (
        lambda: train(cores=torch.zeros(3, 1, 4, 1)),
        TypeError,
        "tt_linear: cores must be a list of tensors, got Tensor",
    ),
    "no cores": (
        lambda: matrix(cores=[]),
        ValueError,
        "ttm_linear: cores must be a list of at least one tensor, got none",
    ),
    "a core no tensor": (
        lambda: train(cores=[*zeros((1, 4, 2), (2, 2, 3)), 3]),
        TypeError,
        "tt_linear: cores[2] must be a tensor, got int",
    ),
    "a core of two modes": (
        lambda: train(cores=zeros((1, 4, 2), (2, 2), (3, 3, 1))),
        ValueError,
        "tt_linear: cores[1] must be [r, n, r'], got [2, 2]",
    ),
    "a core of three modes": (
        lambda: matrix(cores=zeros((1, 4, 2, 5), (5, 6, 1))),
        ValueError,
        "ttm_linear: cores[1] must be [r, out_k, in_k, r'], got [5, 6, 1]",
    ),
    "rank 0": (
        lambda: train(cores=zeros((1, 4, 0), (0, 2, 3), (3, 3, 1))),
        ValueError,
        "tt_linear: cores[0] must be [r, n, r'] with no empty mode, got [1, 4, 0]",
    ),
    "ranks that differ": (
        lambda: train(cores=zeros((1, 4, 4), (3, 2, 3), (3, 3, 1))),
        ValueError,
        "tt_linear: cores[1] must be [r, n, r'] with r = 4, got [3, 2, 3]",
    ),
    "first rank": (
        lambda: train(cores=zeros((2, 4, 2), (2, 2, 3), (3, 3, 2))),
        ValueError,
        "tt_linear: cores[0] must be [r, n, r'] with r = 1, got [2, 4, 2]",
    ),
    "last rank": (
        lambda: train(cores=zeros((1, 4, 2), (2, 2, 3), (3, 3, 2))),
        ValueError,
        "tt_linear: cores[2] must be [r, n, r'] with r' = 1, got [3, 3, 2]",
    ),
    "open ring": (
        lambda: ring(cores=zeros((2, 4, 2), (2, 2, 3), (3, 3, 4))),
        ValueError,
        "tr_linear: cores[2] must be [r, n, r'] with r' = 2, got [3, 3, 4]",
    ),
    "open matrix ring": (
        lambda: matrix(cores=zeros((2, 4, 2, 5), (5, 2, 3, 1))),
        ValueError,
        "ttm_linear: cores[1] must be [r, out_k, in_k, r'] with r' = 2, got [5, 2, 3, 1]",
    ),
    "too few cores": (
        lambda: train(cores=zeros((1, 4, 2), (2, 6, 1))),
        ValueError,
        "tt_linear: cores must be one for each of 1 out_modes and 2 in_modes, got 2",
    ),
    "another mode": (
        lambda: ring(in_modes=(3, 2)),
        ValueError,
        "tr_linear: cores[1] must be [r, n, r'] with n = 3, got [2, 2, 3]",
    ),
    "modes no sequence": (
        lambda: train(in_modes=6),
        TypeError,
        "tt_linear: in_modes must be a sequence of ints >= 1, got 6",
    ),
    "modes of floats": (
        lambda: ring(out_modes=(2.0, 2)),
        TypeError,
        "tr_linear: out_modes must be a sequence of ints >= 1, got (2.0, 2)",
    ),
    "no modes": (
        lambda: train(out_modes=()),
        ValueError,
        "tt_linear: out_modes must be a sequence of ints >= 1, got ()",
    ),
    "mode 0": (
        lambda: train(out_modes=(4, 0)),
        ValueError,
        "tt_linear: out_modes must be a sequence of ints >= 1, got (4, 0)",
    ),
    "bias no tensor": (lambda: train(bias=0.5), TypeError, "tt_linear: bias must be a tensor, got float"),
    "bias of two dims": (
        lambda: matrix(bias=torch.zeros(8, 1)),
        ValueError,
        "ttm_linear: bias must be [out], got [8, 1]",
    ),
    "bias of another size": (
        lambda: ring(bias=torch.zeros(5)),
        ValueError,
        "tr_linear: bias must be [out] with out = 4, got [5]",
    ),
    "dtype of a core": (
        lambda: train(cores=[*zeros((1, 4, 2), (2, 2, 3)), *zeros((3, 3, 1), dtype=torch.float64)]),
        TypeError,
        "tt_linear: cores[2] must have x's dtype torch.float32, got torch.float64",
    ),
    "dtype of the bias": (
        lambda: ring(bias=torch.zeros(4, dtype=torch.float16)),
        TypeError,
        "tr_linear: bias must have x's dtype torch.float32, got torch.float16",
    ),
    "device of a core": (
        lambda: matrix(cores=[*zeros((1, 4, 2, 5)), *zeros((5, 2, 3, 1), device="meta")]),
        ValueError,
        "ttm_linear: cores[1] must be on x's device cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_with_a_reason(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
