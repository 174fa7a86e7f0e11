"""Inference with weights packed on the device: whole convolution, its tail, the pair."""

from __future__ import annotations

import pytest
import torch
from bottleneck_problems import BottleneckCase
from cuda_problems import FORWARD_TOLERANCE, MODES, OPS, Problem, convolution, misaligned, pair, set_precision
from torch import Tensor
from tucker2_problems import LAYOUTS, relative

from tensorcomp_ext.ops._conv_arguments import resolve_geometry
from tensorcomp_ext.ops.tucker2_packed import bind_packed, bind_tail, pack_tucker2, packed_geometry
from tensorcomp_ext.ops.two_factor_linear import bind_packed_pair, pack_two_factor, two_factor_sizes

modes = pytest.mark.parametrize("mode", MODES)
BASE = BottleneckCase(n=3, c_in=17, c_out=16, size=(9, 11), rank_in=6, rank_out=17)
CASES = [
    BASE,
    *(BASE.but(rank_in=r, rank_out=r) for r in (1, 16, 31, 64, 65, 130)),
    BASE.but(c_in=129, c_out=7, bias=False),
    BASE.but(stride=2, padding=[3, 0, 1, 2]),
    BASE.but(dilation=2, kernel=(5, 5), padding=4),
    BASE.but(kernel=(1, 1), padding=0),
    BASE.but(n=0),
]


def numbers(problem: Problem) -> list[int]:
    x, core, factor_out, factor_in = problem.tensors[:4]
    assert x is not None and core is not None and factor_out is not None and factor_in is not None
    geometry = resolve_geometry(core.shape[2:], *problem.rest)
    return packed_geometry(core.shape, factor_in.shape[0], factor_out.shape[0], geometry, problem.tf32)


def packed(problem: Problem) -> Tensor:
    return pack_tucker2(*problem.tensors[1:4])  # type: ignore[arg-type]


def rank_space(problem: Problem) -> Tensor:
    """The first pointwise stage in float64, rounded once."""
    x, factor_in = problem.given["x"].double(), problem.given["factor_in"].double()
    return torch.einsum("nshw,sa->nahw", x, factor_in).to(problem.given["x"].dtype)


@modes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "pixel_slice", "reversed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_convolution(cuda: str, case: BottleneckCase, layout: str, mode: str) -> None:
    problem = convolution(case.but(layout=layout), mode, cuda)
    if not problem.support().ok:
        pytest.skip(problem.support().reason)
    y = OPS.tucker2_conv2d_packed(problem.given["x"], packed(problem), problem.tensors[4], numbers(problem))
    assert relative(y.detach(), problem.oracle()) <= FORWARD_TOLERANCE[mode]
    form = torch._prims_common.suggest_memory_format(problem.given["x"])
    assert y.is_contiguous(memory_format=form)


@modes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tail(cuda: str, case: BottleneckCase, layout: str, mode: str) -> None:
    """Core and last pointwise stage of a rank-space input of any strides."""
    problem = convolution(case, mode, cuda)
    if not problem.support().ok:
        pytest.skip(problem.support().reason)
    z = LAYOUTS[layout]((case.n, case.rank_in, *case.size), MODES[mode], cuda)
    y = OPS.tucker2_conv2d_tail(z, packed(problem), problem.tensors[4], numbers(problem))
    identity = torch.eye(case.rank_in, dtype=torch.float64, device=cuda)
    weights = [t if t is None else t.double() for t in problem.tensors[1:]]
    expected = problem.reference(z.double(), weights[0], weights[1], identity, weights[3], *problem.rest)
    assert relative(y.detach(), expected) <= FORWARD_TOLERANCE[mode]


@modes
@pytest.mark.parametrize("bound", [False, True], ids=["op", "bound"])
@pytest.mark.parametrize("rank", [1, 6, 16, 17, 31, 64, 65, 130])
@pytest.mark.parametrize("rows", [(1,), (0,), (7, 19), (257,)], ids=str)
def test_pair(cuda: str, rows: tuple[int, ...], rank: int, bound: bool, mode: str) -> None:
    for bias in (True, False):
        problem = pair(rows, 129, rank, 65, mode, cuda, bias=bias)
        if not problem.support().ok:
            pytest.skip(problem.support().reason)
        x, a, b, constant = problem.tensors
        assert x is not None and a is not None and b is not None
        weights = pack_two_factor(a, b)
        set_precision(mode)
        if bound:
            y = bind_packed_pair(weights, two_factor_sizes(a, b))(x, constant)
        else:
            y = OPS.two_factor_linear_packed(x, weights, constant, two_factor_sizes(a, b, problem.tf32))
        assert relative(y.detach(), problem.oracle()) <= FORWARD_TOLERANCE[mode]


@modes
def test_bound_convolutions_follow_torchs_switch(cuda: str, mode: str) -> None:
    """Bound once, TF32 or not is decided at each call."""
    problem = convolution(BASE.but(c_in=129, rank_in=31, rank_out=39), mode, cuda)
    weights, x, bias = packed(problem), problem.given["x"], problem.tensors[4]
    whole, tail = bind_packed(weights, numbers(problem)[:14]), bind_tail(weights, numbers(problem)[:14])
    z = rank_space(problem)
    set_precision(mode)
    assert relative(whole(x, bias), problem.oracle()) <= FORWARD_TOLERANCE[mode]
    assert relative(tail(z, bias), problem.oracle()) <= 2 * FORWARD_TOLERANCE[mode]
    set_precision("float32")
    assert (
        relative(whole(x, bias), problem.oracle()) <= FORWARD_TOLERANCE["float32" if mode == "tf32" else mode]
    )


@modes
def test_input_one_element_off(cuda: str, mode: str) -> None:
    problem = convolution(BASE.but(c_in=16, layout="channels_last"), mode, cuda)
    x = misaligned(problem.given["x"])
    y = OPS.tucker2_conv2d_packed(x, packed(problem), problem.tensors[4], numbers(problem))
    assert relative(y.detach(), problem.oracle()) <= FORWARD_TOLERANCE[mode]


def test_weights_packed_for_another_problem_are_refused(cuda: str) -> None:
    problem = convolution(BASE, "float16", cuda)
    other = packed(convolution(BASE.but(rank_in=9), "float16", cuda))
    with pytest.raises(RuntimeError):
        OPS.tucker2_conv2d_packed(problem.given["x"], other, None, numbers(problem))
    with pytest.raises(RuntimeError):
        OPS.tucker2_conv2d_packed(problem.given["x"].float(), packed(problem), None, numbers(problem))
    assert relative(problem.call(), problem.oracle()) <= FORWARD_TOLERANCE["float16"]


@modes
def test_packed_calls_are_captured_and_repeat(cuda: str, mode: str) -> None:
    problem = convolution(BASE, mode, cuda)
    weights, x, bias = packed(problem), problem.given["x"], problem.tensors[4]
    first = OPS.tucker2_conv2d_packed(x, weights, bias, numbers(problem))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = OPS.tucker2_conv2d_packed(x, weights, bias, numbers(problem))
    graph.replay()
    assert torch.equal(first, again)
