"""Which dims of which factors carry a rank, and weights of which some ranks are cut."""

from __future__ import annotations

import pytest
import torch
from network_cases import CASES, Case

from tensorcomp_ext.formats import LowRankSparse, get_format
from tensorcomp_ext.formats.bonds import bond_sizes, stored_at, take

OTHERS = [
    Case("svd", (7, 5), 3),
    Case("svd", (4, 6), 1),
    Case("tucker2", (6, 5, 3, 3), (3, 4)),
    Case("tucker2", (4, 6, 3), (1, 2)),
]
EVERY = [*CASES, *OTHERS]


def ranks_of(weight):
    return (weight.rank,) if isinstance(weight.rank, int) else weight.rank


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_bonds_are_the_ranks_in_their_order(case):
    weight = case.random()
    assert tuple(bond_sizes(weight).values()) == ranks_of(weight)
    for bond, places in weight.bonds().items():
        assert len(places) >= 2
        assert {getattr(weight, name).shape[dim] for name, dim in places} == {bond_sizes(weight)[bond]}
        order = [weight.factor_names.index(name) for name, _ in places]
        assert order == sorted(order)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_bond_joins_its_places(case):
    """Zeros at one end are zeros at the other: what one factor drops no other one can bring back."""
    weight = case.random(dtype=torch.float64)
    dense = weight.to_dense().detach()
    for bond, places in weight.bonds().items():
        found = []
        for name, dim in places:
            factor = getattr(weight, name).data
            entry = factor.select(dim, -1)
            before = entry.clone()
            entry.zero_()
            found.append(weight.to_dense().detach())
            entry.copy_(before)
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)
        if bond_sizes(weight)[bond] > 1:
            assert (found[0] - dense).norm() > 1e-6 * dense.norm()
        else:
            assert found[0].norm() == 0


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_taken_entries_are_those_that_were_not_zeroed(case):
    weight = case.random(dtype=torch.float64)
    kept = {bond: torch.arange(size)[:: 2 if size > 1 else 1] for bond, size in bond_sizes(weight).items()}
    small = take(weight, kept)
    assert type(small) is type(weight)
    assert small.shape == weight.shape
    assert small.structure == weight.structure
    assert bond_sizes(small) == {bond: len(indices) for bond, indices in kept.items()}
    assert small.numel == stored_at(weight, bond_sizes(small))
    assert stored_at(weight, {}) == weight.numel
    for bond, places in weight.bonds().items():
        name, dim = places[0]
        dropped = torch.ones(bond_sizes(weight)[bond], dtype=torch.bool)
        dropped[kept[bond]] = False
        getattr(weight, name).data.index_fill_(dim, dropped.nonzero().flatten(), 0.0)
    torch.testing.assert_close(small.to_dense(), weight.to_dense(), rtol=0, atol=1e-12)


def test_a_taken_weight_is_its_own():
    weight = get_format("tr").random((7, 11), 3).eval()
    weight.core_1.requires_grad_(False)
    whole = take(weight, {})
    assert not whole.training
    assert [f.requires_grad for f in whole.factors] == [f.requires_grad for f in weight.factors]
    whole.core_0.data.zero_()
    assert weight.core_0.abs().sum() > 0
    some = take(weight, {"R_1": torch.tensor([2])})
    assert some.rank == (3, 1)
    assert torch.equal(some.core_1, weight.core_1[2:])


def test_weights_without_inner_ranks_have_no_bonds():
    assert LowRankSparse(None, torch.randn(4, 5)).bonds() == {}


def test_refusals():
    weight = get_format("svd").random((7, 5), 3)
    with pytest.raises(ValueError, match=r"svd has the bonds \['R'\], got 'R_0'"):
        take(weight, {"R_0": torch.tensor([0])})
    with pytest.raises(ValueError, match="of bond R at least one entry must stay"):
        take(weight, {"R": torch.tensor([], dtype=torch.int64)})
