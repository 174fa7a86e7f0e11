"""The CUDA kernel of chains against the float64 oracle: programs, rows, layouts, packed matrices, graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from chain_problems import PROGRAMS, ChainArguments, ChainCase, chain_gradients, chain_oracle
from cuda_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, MODES, set_precision
from pair_problems import PAIR_LAYOUTS
from torch import Tensor
from tucker2_problems import relative

from tensorcomp_ext.ops.chain import bind_packed_chain, chain, native_support, pack_chain

modes = pytest.mark.parametrize("mode", MODES)


def made(case: ChainCase, mode: str, device: str) -> ChainArguments:
    problem = case.make(MODES[mode], device)
    support = native_support(problem.x, problem.matrices, problem.program)
    if not support.ok:
        pytest.skip(support.reason)
    return problem


def step(problem: ChainArguments, grad: Tensor) -> list[Tensor]:
    leaves = problem.leaves()
    y = chain(leaves.x, leaves.matrices, leaves.bias, program=leaves.program, backend="native")
    return [y.detach(), *torch.autograd.grad(y, leaves.tensors, grad)]


def check(problem: ChainArguments, mode: str) -> None:
    set_precision(mode)
    expected = chain_oracle(problem)
    grad = torch.randn(expected.shape).to(problem.x)
    y, *found = step(problem, grad)
    assert y.dtype == MODES[mode] and y.is_contiguous()
    assert relative(y, expected) <= FORWARD_TOLERANCE[mode]
    for i, (gradient, wanted) in enumerate(zip(found, chain_gradients(problem, grad), strict=True)):
        assert relative(gradient, wanted) <= GRADIENT_TOLERANCE[mode], i


@modes
@pytest.mark.parametrize("rows", [(1,), (7, 19), (2500,)], ids=str)
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(cuda: str, program: str, rows: tuple[int, ...], mode: str) -> None:
    check(made(ChainCase(program, rows=rows), mode, cuda), mode)


@modes
@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
def test_layouts(cuda: str, layout: str, mode: str) -> None:
    for bias in (True, False):
        check(made(ChainCase("ring", rows=(3, 5), bias=bias, layout=layout), mode, cuda), mode)


@modes
def test_no_rows(cuda: str, mode: str) -> None:
    problem = made(ChainCase("train", rows=(2, 0)), mode, cuda)
    y, *found = step(problem, problem.x.new_zeros(2, 0, problem.program.out_features))
    assert y.numel() == 0 and not any(bool(g.count_nonzero()) for g in found)


@modes
def test_the_same_bits_twice(cuda: str, mode: str) -> None:
    set_precision(mode)
    problem = made(ChainCase("ring", rows=(3000,)), mode, cuda)
    grad = torch.randn(3000, problem.program.out_features).to(problem.x)
    for once, again in zip(step(problem, grad), step(problem, grad), strict=True):
        assert torch.equal(once, again)


def captured(call: Callable[[], Tensor]) -> Tensor:
    """What a CUDA graph of the call gives when it is replayed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    y.fill_(float("nan"))
    graph.replay()
    return y


@modes
@pytest.mark.parametrize("program", ["ring", "vector widths", "kept outside"])
def test_packed(cuda: str, program: str, mode: str) -> None:
    set_precision(mode)
    problem = made(ChainCase(program, rows=(65,)), mode, cuda)
    packed = pack_chain(problem.matrices, problem.program)
    plain, rectified = (bind_packed_chain(packed, problem.program, relu=relu) for relu in (False, True))
    expected = chain_oracle(problem)
    y = plain(problem.x, problem.bias)
    assert relative(y, expected) <= FORWARD_TOLERANCE[mode]
    assert torch.equal(captured(lambda: plain(problem.x, problem.bias)), y)
    residual = torch.randn(expected.shape).to(problem.x)
    wanted = (expected + residual.double()).relu()
    assert relative(rectified(problem.x, problem.bias, residual), wanted) <= FORWARD_TOLERANCE[mode]
