"""Contractions whose cores, programs or results are shared with something else."""

from __future__ import annotations

import pytest
import torch

from tensorcomp_ext import formats
from tensorcomp_ext.ops._contract_program import PairProgram
from tensorcomp_ext.ops.contract import contract

OPS = torch.ops.tensorcomp


def test_programs_and_sizes_that_read_alike_are_told_apart() -> None:
    """The numbers of one call, run into one list, are those of another."""
    numbers = PairProgram(((1, 2), (2, 3)), (1, 3), ((0, 1),)).encode()
    a, b = torch.randn(64, 8), torch.randn(8, 9)
    OPS.contract([a, b], numbers)
    with pytest.raises((RuntimeError, ValueError)):
        OPS.contract([b], [*numbers, 2, 64, 8])


@pytest.mark.parametrize("create_graph", [False, True])
def test_cores_that_are_the_same_or_depend_on_each_other(create_graph: bool) -> None:
    product = PairProgram(((1, 2), (2, 3)), (1, 3), ((0, 1),))
    a = torch.randn(3, 3, requires_grad=True)
    for other in (lambda: a, lambda: a.exp()):
        expected = torch.autograd.grad((a @ other()).square().sum(), a)[0]
        found = torch.autograd.grad(
            contract([a, other()], product).square().sum(), a, create_graph=create_graph
        )[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rebuilt_weights_may_be_changed_in_place() -> None:
    weight = formats.get_format("tt").empty((8, 8), 2, in_modes=(2, 4), out_modes=(4, 2))
    with torch.no_grad():
        for factor in weight.factors:
            factor.normal_()
    dense = weight.to_dense()
    expected = dense.detach().clone() * 2
    dense.mul_(2)
    torch.testing.assert_close(dense, expected)
    dense.sum().backward()
    assert all(factor.grad is not None for factor in weight.factors)
