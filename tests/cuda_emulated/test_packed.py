"""Packed weights of the emulated CUDA ops: whole convolution, its tail and the pair, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottleneck_problems import PLAIN, BottleneckCase
from cuda_problems import MODES, Problem, convolution
from emulated_problems import (
    FORWARD_TOLERANCE,
    check_like_fake,
    forward,
    geometry,
    inside,
    pair_problem,
    shifted,
    turned,
)
from pair_problems import PAIR_LAYOUTS, PairCase
from torch import Tensor
from tucker2_problems import LAYOUTS, relative

modes = pytest.mark.parametrize("mode", MODES)
CASES = [
    PLAIN,
    PLAIN.but(rank_in=1, rank_out=1),
    PLAIN.but(rank_in=16, rank_out=33, n=3),
    PLAIN.but(rank_in=65, rank_out=17, n=1),
    PLAIN.but(c_in=16, c_out=40, bias=False),
    PLAIN.but(c_in=1, c_out=1),
    PLAIN.but(stride=2, padding=[3, 0, 1, 2]),
    PLAIN.but(dilation=2, kernel=(5, 3), padding=4),
    PLAIN.but(kernel=(1, 1), padding=0),
    PLAIN.but(size=(1, 9)),
    PLAIN.but(size=(9, 1)),
    PLAIN.but(n=0),
]


def packed(ops: Any, problem: Problem) -> Tensor:
    weights = ops.tucker2_conv2d_pack(*problem.tensors[1:4])
    assert weights.dtype == torch.uint8 and weights.dim() == 1 and weights.is_contiguous()
    return weights


def numbers(problem: Problem) -> list[list[int]]:
    """The geometry of 15 ints, and of 14 where that means the same."""
    exact = geometry(problem)
    return [geometry(problem, problem.tf32), *([] if problem.tf32 else [exact])]


@modes
@pytest.mark.parametrize(
    "case",
    [*(case.but(layout="channels_last") for case in CASES), *(PLAIN.but(layout=name) for name in LAYOUTS)],
    ids=str,
)
def test_whole_convolution(emulated: Any, case: BottleneckCase, mode: str) -> None:
    """The same bits as the op of unpacked weights."""
    problem = convolution(case, mode, "cpu")
    weights = packed(emulated, problem)
    for ints in numbers(problem):
        arguments = (problem.given["x"], weights, problem.tensors[4], ints)
        y = emulated.tucker2_conv2d_packed(*arguments)
        assert relative(y, problem.oracle()) <= FORWARD_TOLERANCE[mode]
        assert torch.equal(y, forward(emulated, problem))
        check_like_fake("tucker2_conv2d_packed", y, *arguments)


@modes
@pytest.mark.parametrize(
    ("case", "layout"),
    [*((case, "channels_last") for case in CASES), *((PLAIN.but(rank_in=16), name) for name in LAYOUTS)],
    ids=str,
)
def test_tail(emulated: Any, case: BottleneckCase, layout: str, mode: str) -> None:
    """Core and last pointwise stage of a rank-space image of any strides."""
    problem = convolution(case, mode, "cpu")
    z = LAYOUTS[layout]((case.n, case.rank_in, *case.size), MODES[mode])
    core, factor_out, _, bias = (t if t is None else t.double() for t in problem.tensors[1:])
    identity = torch.eye(case.rank_in, dtype=torch.float64)
    expected = problem.reference(z.double(), core, factor_out, identity, bias, *problem.rest)
    weights = packed(emulated, problem)
    for ints in numbers(problem):
        y = emulated.tucker2_conv2d_tail(z, weights, problem.tensors[4], ints)
        assert y.dtype == MODES[mode] and relative(y, expected) <= FORWARD_TOLERANCE[mode]
        check_like_fake("tucker2_conv2d_tail", y, z, weights, problem.tensors[4], ints)


@modes
@pytest.mark.parametrize("view", [inside, turned, shifted])
def test_weights_and_bias_of_any_strides(emulated: Any, view: Any, mode: str) -> None:
    problem = convolution(PLAIN.but(c_in=16, layout="channels_last"), mode, "cpu")
    plain = packed(emulated, problem)
    strided = emulated.tucker2_conv2d_pack(*(view(t) for t in problem.tensors[1:4]))
    x, bias = shifted(problem.given["x"]), view(problem.given["bias"])
    ints = geometry(problem, problem.tf32)
    y = emulated.tucker2_conv2d_packed(x, strided, bias, ints)
    assert relative(y, problem.oracle()) <= FORWARD_TOLERANCE[mode]
    assert torch.equal(y, emulated.tucker2_conv2d_packed(x, plain, bias, ints))


@pytest.mark.parametrize("case", [PLAIN.but(c_in=129, rank_in=31, rank_out=39)], ids=str)
def test_one_packing_serves_exact_and_rounded_products(emulated: Any, case: BottleneckCase) -> None:
    problem = convolution(case, "float32", "cpu")
    x, bias, weights = problem.given["x"], problem.tensors[4], packed(emulated, problem)
    exact, rounded = (
        relative(emulated.tucker2_conv2d_packed(x, weights, bias, geometry(problem, tf32)), problem.oracle())
        for tf32 in (False, True)
    )
    assert exact <= FORWARD_TOLERANCE["float32"] < rounded <= FORWARD_TOLERANCE["tf32"]


@modes
@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
@pytest.mark.parametrize("rank", [1, 16, 33, 130])
def test_pair(emulated: Any, rank: int, layout: str, mode: str) -> None:
    for rows, bias in (((), True), ((1,), False), ((0,), True), ((7, 3), False), ((2, 1, 5), True)):
        case = PairCase(rows=rows, rank=rank, c_in=33, c_out=17, bias=bias, layout=layout)
        problem = pair_problem(case, mode)
        x, a, b, constant = problem.tensors
        weights = emulated.two_factor_linear_pack(a, b)
        assert weights.dtype == torch.uint8 and weights.dim() == 1
        arguments = (x, weights, constant, [17, rank, 33, int(problem.tf32)])
        y = emulated.two_factor_linear_packed(*arguments)
        assert y.dtype == MODES[mode] and relative(y, problem.oracle()) <= FORWARD_TOLERANCE[mode]
        assert torch.equal(y, forward(emulated, problem))
        check_like_fake("two_factor_linear_packed", y, *arguments)


def test_weights_packed_for_something_else_are_refused(emulated: Any) -> None:
    """Other sizes and dtypes of as many bytes: kernels turned, ranks of equal padding, another half."""
    core, factor_out, factor_in = torch.randn(4, 3, 1, 3), torch.randn(6, 4), torch.randn(5, 3)
    x, window = torch.randn(2, 5, 9, 9), [1, 1, 0, 0, 0, 0, 1, 1]
    packed = emulated.tucker2_conv2d_pack(core, factor_out, factor_in)
    emulated.tucker2_conv2d_packed(x, packed, None, [4, 3, 1, 3, 5, 6, *window])
    for sizes in ([4, 3, 3, 1, 5, 6], [4, 5, 1, 3, 5, 6], [4, 3, 1, 3, 5, 7]):
        with pytest.raises(RuntimeError, match="packed for other sizes"):
            emulated.tucker2_conv2d_packed(x, packed, None, [*sizes, *window])
    a, b = torch.randn(6, 3).half(), torch.randn(3, 5).half()
    pair = emulated.two_factor_linear_pack(a, b)
    with pytest.raises(RuntimeError, match="packed for other sizes, another dtype"):
        emulated.two_factor_linear_packed(torch.randn(2, 5).bfloat16(), pair, None, [6, 3, 5, 0])
