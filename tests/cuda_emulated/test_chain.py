"""The chain of the emulated CUDA ops against the float64 oracle: programs, rows, layouts, packed matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from chain_problems import PROGRAMS, ChainArguments, ChainCase
from cuda_problems import MODES
from emulated_problems import (
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    check_like_fake,
    inside,
    no_reference,
    shifted,
    turned,
)
from pair_problems import PAIR_LAYOUTS
from torch import Tensor
from tucker2_problems import relative

from tensorcomp_ext import reference

SHARED = 163 * 1024  # of a block in the emulator
modes = pytest.mark.parametrize("mode", MODES)


def made(case: ChainCase, mode: str) -> ChainArguments:
    return case.make(MODES[mode])


def fits(case: ChainCase, mode: str) -> bool:
    numbers, size = PROGRAMS[case.program].encode(), MODES[mode].itemsize
    return bool(torch.ops.tensorcomp.cuda_fits_chain(numbers, size, SHARED))


def arguments(problem: ChainArguments, mode: str) -> tuple[Any, ...]:
    return problem.x, problem.matrices, problem.bias, problem.program.encode(), mode == "tf32"


def oracle(problem: ChainArguments) -> Tensor:
    bias = None if problem.bias is None else problem.bias.double()
    return reference.chain(problem.x.double(), [m.double() for m in problem.matrices], bias, *problem.program)


def oracle_gradients(problem: ChainArguments, grad: Tensor) -> list[Tensor]:
    """Of x, bias and matrices, also of a bias that is not given."""
    tensors = [problem.x, problem.x.new_zeros(problem.program.out_features), *problem.matrices]
    x, bias, *matrices = (t.detach().double().requires_grad_() for t in tensors)
    y = reference.chain(x, matrices, bias, *problem.program)
    return list(torch.autograd.grad(y, [x, bias, *matrices], grad.double()))


def check(ops: Any, problem: ChainArguments, mode: str, grad: Tensor | None = None) -> None:
    """Forward and every gradient, from the kernels alone."""
    expected = oracle(problem)
    grad = torch.randn(expected.shape).to(problem.x.dtype) if grad is None else grad
    with no_reference():
        y = ops.chain(*arguments(problem, mode))
        mask = (4 << len(problem.matrices)) - 1
        numbers, tf32 = problem.program.encode(), mode == "tf32"
        found = ops.chain_backward(grad, problem.x, problem.matrices, numbers, mask, tf32)
    assert y.dtype == MODES[mode]
    assert relative(y, expected) <= FORWARD_TOLERANCE[mode]
    for i, (gradient, wanted) in enumerate(zip(found, oracle_gradients(problem, grad), strict=True)):
        assert gradient.dtype == MODES[mode], i
        assert relative(gradient, wanted) <= GRADIENT_TOLERANCE[mode], i


@modes
@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "train of 16"])
def test_programs(emulated: Any, program: str, mode: str) -> None:
    case = ChainCase(program)
    assert fits(case, mode)
    check(emulated, made(case, mode), mode)


@pytest.mark.parametrize("mode", ["bfloat16", "float16"])
def test_long_rows(emulated: Any, mode: str) -> None:
    check(emulated, made(ChainCase("train of 16", rows=(2,)), mode), mode)


@modes
@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, 0, 3), (3, 1, 5), (67,)], ids=str)
def test_rows(emulated: Any, rows: tuple[int, ...], mode: str) -> None:
    check(emulated, made(ChainCase("train", rows=rows), mode), mode)
    check(emulated, made(ChainCase("vector widths", rows=rows, bias=False), mode), mode)


@modes
@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
def test_layouts(emulated: Any, layout: str, mode: str) -> None:
    for program in ("ring", "vector widths"):
        problem = made(ChainCase(program, rows=(2, 3), layout=layout), mode)
        grad = torch.randn(2, 3, problem.program.out_features).to(problem.x.dtype)
        for view in (inside, turned, shifted):
            check(emulated, problem, mode, view(grad))


@pytest.mark.parametrize("program", ["pair", "ring"])
def test_expanded_rows(emulated: Any, program: str) -> None:
    problem = made(ChainCase(program, rows=(4, 3)), "float32")
    check(emulated, replace(problem, x=problem.x[:1].expand(4, -1, -1)), "float32")
    check(emulated, replace(problem, x=problem.x[..., :1].expand(problem.x.shape)), "float32")


def test_every_mask(emulated: Any) -> None:
    problem = made(ChainCase("ring of two"), "float16")
    grad = torch.randn(7, problem.program.out_features).half()
    expected = oracle_gradients(problem, grad)
    for mask in range(4 << len(problem.matrices)):
        inputs = (grad, problem.x, problem.matrices, problem.program.encode(), mask)
        with no_reference():
            found = emulated.chain_backward(*inputs)
        check_like_fake("chain_backward", tuple(found), *inputs)
        for bit, (gradient, wanted) in enumerate(zip(found, expected, strict=True)):
            if mask >> bit & 1:
                assert relative(gradient, wanted) <= GRADIENT_TOLERANCE["float16"], (mask, bit)
            else:
                assert gradient.shape == (0,), (mask, bit)


@modes
@pytest.mark.parametrize("rows", [(0,), (3, 5)], ids=str)
@pytest.mark.parametrize("program", ["ring", "pair", "vector widths", "kept outside"])
def test_packed(emulated: Any, program: str, rows: tuple[int, ...], mode: str) -> None:
    """The same bits as the op of unpacked matrices; with residual and ReLU the oracle's numbers."""
    problem = made(ChainCase(program, rows=rows), mode)
    x, matrices, bias, numbers, tf32 = arguments(problem, mode)
    packed = emulated.chain_pack(matrices, numbers)
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    plain = (x, packed, bias, numbers, None, False, tf32)
    y = emulated.chain_packed(*plain)
    check_like_fake("chain_packed", y, *plain)
    assert torch.equal(y, emulated.chain(*arguments(problem, mode)))
    expected = oracle(problem)
    for residual in (None, torch.randn(expected.shape).to(x), turned(torch.randn(expected.shape).to(x))):
        for constant in (bias, None):
            y = emulated.chain_packed(x, packed, constant, numbers, residual, True, tf32)
            wanted = expected if constant is not None or bias is None else expected - bias.double()
            wanted = (wanted if residual is None else wanted + residual.double()).relu()
            assert relative(y, wanted) <= FORWARD_TOLERANCE[mode]
            assert bool((y >= 0).all())


def test_what_does_not_fit_goes_to_the_reference(emulated: Any) -> None:
    case = ChainCase("train of 16", rows=(2,))
    assert not fits(case, "float32") and fits(case, "bfloat16")
    problem = made(case, "float32")
    assert relative(emulated.chain(*arguments(problem, "float32")), oracle(problem)) <= 1e-5
    double = case.make(torch.float64)
    assert relative(emulated.chain(*arguments(double, "float64")), oracle(double)) <= 1e-12
    grad = torch.randn(2, problem.program.out_features)
    found = emulated.chain_backward(grad, problem.x, problem.matrices, problem.program.encode(), 31)
    for gradient, wanted in zip(found, oracle_gradients(problem, grad), strict=True):
        assert relative(gradient, wanted) <= 1e-4
    with pytest.raises(RuntimeError, match="does not fit this device's shared memory"):
        emulated.chain_pack(problem.matrices, problem.program.encode())


@modes
def test_the_same_bits_twice(emulated: Any, mode: str) -> None:
    problem = made(ChainCase("ring", rows=(90,)), mode)
    grad = torch.randn(90, problem.program.out_features).to(problem.x.dtype)
    inputs = (grad, problem.x, problem.matrices, problem.program.encode(), 31, mode == "tf32")
    first, again = (emulated.chain_backward(*inputs) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert torch.equal(emulated.chain(*arguments(problem, mode)), emulated.chain(*arguments(problem, mode)))


def test_refusals(emulated: Any) -> None:
    problem = made(ChainCase("pair"), "float32")
    x, (a, b), bias, numbers, _ = arguments(problem, "float32")
    packed = emulated.chain_pack([a, b], numbers)
    for bad, message in (
        ((x, [a], bias, numbers), r"matrices must be one for each of 2 steps, got 1"),
        ((x, [a, b.t()], bias, numbers), r"matrices\[1\] must be \[9, 5\], got \[5, 9\]"),
        ((x, [a, b.half()], bias, numbers), "one dtype"),
        ((x[:, 1:], [a, b], bias, numbers), r"x must be \[..., 12\], got \[7, 11\]"),
        ((x, [a, b], bias[1:], numbers), r"bias must be \[9\]"),
        ((x, [a, b], bias, numbers[:-1]), "program does not describe a chain"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.chain(*bad)
    for bad, message in (
        ((x.half(), packed, None, numbers), "packed for another program, another dtype"),
        ((x, packed[:-1], None, numbers), "packed for another program"),
        ((x, packed, None, numbers, torch.zeros(7, 8)), "residual must have the shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.chain_packed(*bad)
    with pytest.raises(RuntimeError, match="grad must"):
        emulated.chain_backward(torch.zeros(7, 8), x, [a, b], numbers, 1)
