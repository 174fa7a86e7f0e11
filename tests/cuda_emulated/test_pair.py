"""The two-factor pair of the emulated CUDA ops against the float64 oracle: rows, sizes, layouts, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_problems import MODES
from emulated_problems import (
    check_forward,
    check_gradients,
    far_apart,
    inside,
    pair_problem,
    random_grad,
    shifted,
    turned,
)
from pair_problems import PAIR_CASES, PAIR_LAYOUTS, PairCase
from torch import Tensor

modes = pytest.mark.parametrize("mode", MODES)
CASES = [
    *(case for case in PAIR_CASES if case.c_in and case.c_out),
    PairCase(rows=(3, 1, 5), c_in=40, c_out=24, rank=33),
    PairCase(rows=(2, 70), c_in=48, c_out=130, rank=100),
]


def expanded_rows(x: Tensor) -> Tensor:
    return x[..., :1, :].expand(x.shape)


def expanded_batch(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def one_row(x: Tensor) -> Tensor:
    return x[0, 0].expand(x.shape)


def one_number(x: Tensor) -> Tensor:
    return x.flatten()[0].expand(x.shape)


def swapped(x: Tensor) -> Tensor:
    """Leading dimensions that do not follow each other in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def columns(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 8), float("nan"))
    return wide[..., 4:-4].copy_(x)


VIEWS = (expanded_rows, expanded_batch, one_row, one_number, swapped, columns, inside, turned, shifted)


@pytest.mark.parametrize(("mode", "layout"), list(zip(MODES, PAIR_LAYOUTS, strict=True)))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes_and_layouts(emulated: Any, case: PairCase, layout: str, mode: str) -> None:
    problem = pair_problem(case.but(layout=layout), mode)
    check_forward(emulated, problem)
    check_gradients(emulated, problem)


@modes
@pytest.mark.parametrize("c_in", [16, 18])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_x_and_grad(emulated: Any, view: Callable[[Tensor], Tensor], c_in: int, mode: str) -> None:
    problem = pair_problem(PairCase(rows=(3, 6), c_in=c_in, c_out=c_in), mode)
    strided = problem.but([view(problem.given["x"]), *problem.tensors[1:]])
    check_forward(emulated, strided)
    check_gradients(emulated, strided)
    check_gradients(emulated, problem, view(random_grad(problem)))
    check_gradients(emulated, strided, view(random_grad(problem)))


@modes
@pytest.mark.parametrize("dims", [1, 2, 3, 4, 5])
def test_dimensions_of_x(emulated: Any, dims: int, mode: str) -> None:
    """One row to five dimensions, in memory from the last to the first and back."""
    for view in (Tensor.contiguous, turned, inside):
        problem = pair_problem(PairCase(rows=(2, 1, 3, 2)[: dims - 1]), mode)
        problem = problem.but([view(problem.given["x"]), *problem.tensors[1:]])
        assert problem.given["x"].dim() == dims
        y = check_forward(emulated, problem)
        assert y.dim() == dims
        check_gradients(emulated, problem, view(random_grad(problem)))


@pytest.mark.parametrize("dim", [0, 1])
def test_elements_far_apart(emulated: Any, dim: int) -> None:
    """Strides of more than 32 bits."""
    problem = pair_problem(PairCase(rows=(5,)), "float16")
    problem = problem.but([far_apart(problem.given["x"], dim), *problem.tensors[1:]])
    check_forward(emulated, problem)
    check_gradients(emulated, problem, far_apart(random_grad(problem), dim))


@modes
@pytest.mark.parametrize("view", [inside, turned, shifted])
def test_weights_of_any_strides(emulated: Any, view: Callable[[Tensor], Tensor], mode: str) -> None:
    problem = pair_problem(PairCase(), mode)
    strided = problem.but([problem.tensors[0], *(view(t) for t in problem.tensors[1:] if t is not None)])
    check_forward(emulated, strided)
    check_gradients(emulated, strided)


@pytest.mark.parametrize("rank", [300, 600])
@pytest.mark.parametrize("mode", ["float32", "float16"])
def test_ranks_of_hundreds(emulated: Any, rank: int, mode: str) -> None:
    problem = pair_problem(PairCase(rows=(3,), rank=rank), mode)
    check_forward(emulated, problem)
    check_gradients(emulated, problem)


@modes
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_one_bad_row_stays_where_it_is(emulated: Any, value: str, mode: str) -> None:
    problem = pair_problem(PairCase(rows=(40,)), mode)
    clean = problem.oracle()
    problem.given["x"][17, 3] = float(value)
    y = emulated.two_factor_linear(*problem.arguments())
    others = torch.arange(40) != 17
    assert not y[17].isfinite().any() and y[others].isfinite().all()
    assert (y.double() - clean)[others].norm() <= 1e-2 * clean[others].norm()
