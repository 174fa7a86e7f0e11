"""Ranks of linear layers whose in modes index the features in another order (`input_order`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorcomp_ext as tc
from tensorcomp_ext.formats import get_format
from tensorcomp_ext.nn import FactorizedLinear

OPTIONS: dict[str, Any] = {"in_modes": (2, 3, 5), "out_modes": (4, 2, 3)}
ORDER = (2, 0, 1)


def layer() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(30, 24, dtype=torch.float64)


def in_own_order(weight: Tensor) -> Tensor:
    """The columns, indexed by modes 5, 2, 3, brought to the order of the in modes 2, 3, 5."""
    return weight.reshape(-1, 5, 2, 3).permute(0, 2, 3, 1).reshape(-1, 30)


@pytest.mark.parametrize("format", ["cp", "tucker", "tt", "tr", "ttm", "tr_matrix"])
@pytest.mark.parametrize("rank", [0.2, tc.ranks.Params(144)])
def test_fractions(format: str, rank: Any) -> None:
    linear = layer()
    made = FactorizedLinear.from_linear(linear, format, rank=rank, input_order=ORDER, **OPTIONS)
    assert made.weight.structure["input_order"] == list(ORDER)
    assert made.weight.numel <= 0.2 * linear.weight.numel()

    # The same decomposition of the weight with its columns moved by hand.
    moved = layer()
    moved.weight.data = in_own_order(linear.weight.data)
    plain = FactorizedLinear.from_linear(moved, format, rank=rank, **OPTIONS)
    assert made.rank == plain.rank
    torch.testing.assert_close(in_own_order(made.weight.to_dense()), plain.weight.to_dense())
    x = torch.randn(7, 30, dtype=torch.float64)
    torch.testing.assert_close(made(x), plain(in_own_order(x)))


@pytest.mark.parametrize("format", ["tucker", "tt"])
def test_spectra_are_those_of_the_ordered_weight(format: str) -> None:
    torch.manual_seed(1)
    cls = get_format(format)
    planted = cls.random((24, 30), 2, dtype=torch.float64, input_order=ORDER, **OPTIONS)
    linear = layer()
    linear.weight.data = planted.to_dense().detach()
    energy = tc.ranks.Energy(1.0 - 1e-12)
    made = FactorizedLinear.from_linear(linear, format, rank=energy, input_order=ORDER, **OPTIONS)
    assert made.rank == planted.rank
    torch.testing.assert_close(made.weight.to_dense(), linear.weight)
    unordered = FactorizedLinear.from_linear(linear, format, rank=energy, **OPTIONS)
    assert unordered.weight.numel > made.weight.numel
