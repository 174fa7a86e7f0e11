"""Batch normalization folded into weights with a sparse part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fold_networks import folded_layers, randomize
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext.compress.fold_weights import difference, scaled
from tensorcomp_ext.formats import LowRankSparse, PackedLowRankSparse
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear

CASES: list[tuple[str, Any, int]] = [
    ("svd", 4, 1),
    ("tucker2", (3, 2), 1),
    ("tt", (3, 2), 1),
    ("cp", 4, 1),
    ("tr", 2, 1),
    ("none", (), 1),
    ("none", (), 5),
    ("cp", 2, 5),
]


@pytest.mark.parametrize("low_rank,rank,groups", CASES)
@pytest.mark.parametrize("mode", ["additive", "masking"])
@pytest.mark.parametrize("finalized", [False, True])
def test_convolutions(low_rank: str, rank: Any, groups: int, mode: str, finalized: bool) -> None:
    torch.manual_seed(0)
    options = {"format": "lowrank_sparse", "low_rank": low_rank, "mode": mode}
    layer = FactorizedConv2d(5, 10, 3, padding=1, groups=groups, rank=rank, **options)
    layer.weight.keep(torch.rand(layer.weight.shape) < 0.2)
    model = randomize(nn.Sequential(layer, nn.BatchNorm2d(10), nn.ReLU()))
    if finalized:
        layer.finalize()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 5, 6, 7)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules()), made.fold_report
    (folded,) = folded_layers(made)
    assert isinstance(folded.weight, PackedLowRankSparse) and folded.geometry.groups == groups
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("low_rank", ["svd", "none"])
def test_linear_layers(low_rank: str) -> None:
    torch.manual_seed(0)
    rank: Any = () if low_rank == "none" else 3
    layer = FactorizedLinear(12, 9, format="lowrank_sparse", rank=rank, low_rank=low_rank)
    layer.weight.keep(torch.rand(layer.weight.shape) < 0.3)
    model, x = randomize(nn.Sequential(layer.finalize(), nn.BatchNorm1d(9))), torch.randn(4, 12)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    assert len(folded_layers(made)) == 1 and not any(isinstance(m, nn.BatchNorm1d) for m in made.modules())


def test_every_output_has_its_factor() -> None:
    """Wide rows, which are packed in segments, and rows without an entry among them."""
    values = torch.zeros(4, 70_000, dtype=torch.float64)
    values[0, [1, 69_999]], values[2, 65_536] = torch.tensor([1.0, 2.0], dtype=torch.float64), 3.0
    scale = torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    found = scaled(LowRankSparse(None, values, values != 0), scale)
    assert torch.equal(found.to_dense(), values * scale[:, None])
