"""Orders of contraction: the cheapest one is found, and each one computes the layer."""

from __future__ import annotations

import random

import pytest
import torch
from network_problems import STRUCTURES, dense_weight, every_order, random_cores
from tucker2_problems import relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import Program, Step
from tensorcomp_ext.ops._chain_program import check
from tensorcomp_ext.ops._contraction import (
    Macs,
    Structure,
    cheapest_order,
    describe,
    merge_plan,
    order_cost,
)
from tensorcomp_ext.ops._contraction_layout import chain_of
from tensorcomp_ext.ops._contraction_products import einsum_equation
from tensorcomp_ext.ops._library_chain import library_chain
from tensorcomp_ext.ops._network_linear import matrix_structure, train_structure

every_structure = pytest.mark.parametrize("name", STRUCTURES)


def train(modes: tuple[int, ...], outputs: int, rank: int) -> Structure:
    ranks = (1, *(rank,) * (len(modes) - 1), 1)
    cores = [torch.empty(r, n, s, device="meta") for r, n, s in zip(ranks, modes, ranks[1:], strict=False)]
    return train_structure(cores, outputs, False)


@every_structure
def test_the_cheapest_of_all_orders(name: str) -> None:
    structure = STRUCTURES[name]
    orders = every_order(structure)
    for cost in (Macs(1), Macs(7), Macs(100), Macs(1, merging=False)):
        for groups in (None, 1, 2, 3, 9):
            costs = [order_cost(structure, o, cost) for o in orders if groups in (None, len(o))]
            found = cheapest_order(structure, cost, groups)
            assert (found is None) == (not costs)
            if found is not None:
                assert order_cost(structure, found, cost) == min(costs)
                assert groups in (None, len(found))


@every_structure
def test_every_order_computes_the_layer(name: str) -> None:
    structure = STRUCTURES[name]
    orders = every_order(structure)
    if len(orders) > 60:
        orders = random.Random(0).sample(orders, 60)
    cores = [core.requires_grad_() for core in random_cores(structure)]
    weight = dense_weight(structure, cores)
    x = torch.randn(5, weight.shape[1], dtype=torch.float64, requires_grad=True)
    y = x @ weight.t()
    gradient = torch.randn_like(y)
    wanted = torch.autograd.grad(y, [x, *cores], gradient)
    for order in orders:
        found = chain_of(structure, order)
        check(found.program)
        assert found.program.macs() == order_cost(structure, order, Macs(1, merging=False))
        matrices = found.matrices(cores)
        assert [tuple(m.shape) for m in matrices] == found.program.matrix_shapes()
        for made in (
            reference.chain(x, matrices, None, *found.program),
            library_chain(x, matrices, program=found.program),
        ):
            assert relative(made.detach(), y.detach()) <= 1e-12, order
            gradients = torch.autograd.grad(made, [x, *cores], gradient, retain_graph=True)
            for one, other in zip(gradients, wanted, strict=True):
                assert relative(one, other) <= 1e-12, order


def test_no_row_meets_an_open_label_twice() -> None:
    cp = STRUCTURES["cp"]
    for order in (((2,), (3,), (0, 1)), ((0,), (1,), (2, 3)), ((2, 3), (0,), (1,))):
        with pytest.raises(ValueError, match="chain: "):
            order_cost(cp, order, Macs())
        with pytest.raises(ValueError, match="chain: no products follow the order"):
            chain_of(cp, order)
    with pytest.raises(ValueError, match="leaves out some of 4 cores"):
        order_cost(cp, ((2, 3),), Macs())
    with pytest.raises(ValueError, match="does not lead to the outputs"):
        chain_of(cp, ((2, 3),))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", ["matrix", "train"])
def test_sweeps_move_nothing(name: str, backwards: bool) -> None:
    """What lies side by side stays there: results take the place of what was summed."""
    if name == "matrix":
        cores = [torch.empty(r, 16, 16, s, device="meta") for r, s in ((1, 4), (4, 4), (4, 1))]
        structure = matrix_structure(cores)
    else:
        structure = train((16,) * 6, 3, 4)
    count = len(structure.labels)
    if name == "train" and not backwards:
        return  # the input meets the cores of a train from the last one on
    order = tuple((core,) for core in (reversed(range(count)) if backwards else range(count)))
    program = chain_of(structure, order).program
    for place, step in enumerate(program.steps):
        dims = program.dims_after(place)
        first, last = step.contracted[0], step.contracted[-1]
        assert step.contracted == tuple(range(first, last + 1))
        kept, new = len(dims) - len(step.contracted), len(step.new)
        in_place = (*range(first), *range(kept, kept + new), *range(first, kept))
        assert step.order == in_place


def test_dims_that_stay_together_are_one() -> None:
    structure = train((4, 5, 6, 7), 2, 3)
    dense = chain_of(structure, ((0, 1, 2, 3),)).program
    assert dense == Program((42,), (Step((0,), (20,), (0,)),))
    pair = chain_of(structure, ((2, 3), (0, 1))).program
    assert pair == Program((42,), (Step((0,), (3,), (0,)), Step((0,), (20,), (0,))))


def test_of_equal_orders_the_shorter() -> None:
    structure = train((4, 4), 1, 4)  # 16 multiply-adds a row at once, 32 by the pair; merging is free
    assert cheapest_order(structure, Macs(1, merging=False)) == ((0, 1),)
    same = train((4, 4), 1, 2)
    assert order_cost(same, ((1,), (0,)), Macs(1, False)) == order_cost(same, ((0, 1),), Macs(1, False)) == 16
    assert cheapest_order(same, Macs(1, merging=False)) == ((0, 1),)


def test_merging_counts_once_a_call() -> None:
    structure = train((16,) * 6, 3, 16)
    few, many = cheapest_order(structure, Macs(1)), cheapest_order(structure, Macs(4096))
    assert few is not None and max(map(len, few)) < 3
    assert many == ((3, 4, 5), (0, 1, 2))
    assert order_cost(structure, ((3, 4, 5), (0, 1, 2)), Macs(1, False)) == 2 * 16 * 4096


def test_merging_takes_the_cheapest_pairs() -> None:
    structure = train((30, 2, 30), 2, 5)
    plan = merge_plan(structure, (0, 1, 2))
    # The narrow end first: 2·5·5·30 and then 30·5·60, not 30·5·2·5 and then 60·5·30 twice as large.
    assert plan.macs == min(5 * 2 * 5 * 30 + 30 * 5 * 2 * 30, 30 * 5 * 2 * 5 + 30 * 2 * 5 * 30)
    assert plan.pairs[-1][0] + plan.pairs[-1][1] in {(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)}


@pytest.mark.parametrize("count", [10, 13])
def test_many_cores(count: int) -> None:
    structure = train((2,) * count, count // 2, 2)
    cores = random_cores(structure)
    weight = dense_weight(structure, cores)
    x = torch.randn(3, weight.shape[1], dtype=torch.float64)
    for cost, groups in ((Macs(1), None), (Macs(1000), None), (Macs(1), 1), (Macs(1), 2)):
        order = cheapest_order(structure, cost, groups)
        assert order is not None and sorted(core for group in order for core in group) == [*range(count)]
        found = chain_of(structure, order)
        y = library_chain(x, found.matrices(cores), program=found.program)
        assert relative(y, x @ weight.t()) <= 1e-12


def test_long_trailing_dims_are_multiplied_where_they_lie() -> None:
    cores = [torch.randn(r, 8, 8, s, dtype=torch.float64) for r, s in ((1, 3), (3, 2), (2, 1))]
    structure = matrix_structure(cores)
    weight = dense_weight(structure, cores)
    x = torch.randn(4, 512, dtype=torch.float64)
    found = chain_of(structure, ((0,), (1,), (2,)))
    strided = torch.randn(512, 4, dtype=torch.float64).t()
    for rows in (x, x[:0], x[0], x[:, None], strided):
        bias = torch.randn(512, dtype=torch.float64)
        y = library_chain(rows, found.matrices(cores), bias, program=found.program)
        assert y.shape == rows.shape
        assert relative(y, rows @ weight.t() + bias) <= 1e-12


def test_orders_for_people() -> None:
    assert describe(((5,), (3, 4), (0,))) == "x·G5·(G3 G4)·G0"


def test_more_labels_than_letters_are_refused() -> None:
    assert einsum_equation([(7, 9), (9, 4)], (4, 7)) == "ab,bc->ca"
    many = tuple(range(53))
    with pytest.raises(ValueError, match="einsum: a product must have at most 52 labels, got 53"):
        einsum_equation([many], many)
