"""Convolutions: geometry against torch.nn, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tensorcomp_ext.nn import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedLinear,
    from_config,
)
from tensorcomp_ext.plan import plans_for
from tensorcomp_ext.ranks import Energy

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 5), "stride": (1, 3), "padding": (0, 2)},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "dilation": 2, "padding": "same"},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "dilation": (1, 2)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels,rank", [((1, 7), (1, 1)), ((16, 17), (13, 5)), ((5, 3), (3, 5))])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_equals_torch(
    geometry: dict[str, Any], channels: tuple[int, int], rank: tuple[int, int], layout: str
) -> None:
    layer = FactorizedConv2d(*channels, **geometry, rank=rank)
    nn.init.normal_(layer.bias)
    dense = nn.Conv2d(*channels, **geometry).double()
    dense.load_state_dict({"weight": layer.double().weight.to_dense(), "bias": layer.bias})
    layer.float()
    x = torch.randn(3, channels[0], 13, 12)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(3, channels[0] + 2, 15, 13)[:, 1:-1, 2:, :-1]
    expected = dense(x.double())
    for plan in plans_for(layer):
        if not plan.support(layer, layer.case(x)).ok:
            continue
        layer.plan = plan.name
        with torch.no_grad():
            y = layer(x)
        assert y.shape == expected.shape
        assert (y - expected).norm() <= 1e-5 * expected.norm(), plan.name


def test_unbatched_and_empty_batch() -> None:
    layer = FactorizedConv2d(4, 6, 3, padding=1, rank=(3, 2))
    x = torch.randn(4, 8, 7)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert layer(x).shape == (6, 8, 7)
            torch.testing.assert_close(layer(x), layer(x[None])[0])
            assert layer(x.new_empty(0, 4, 8, 7)).shape == (0, 6, 8, 7)


def test_constructor_follows_torch() -> None:
    ours = FactorizedConv2d(4, 6, (3, 5), 2, (1, 2), 1, 1, False, rank=2)
    theirs = nn.Conv2d(4, 6, (3, 5), 2, (1, 2), 1, 1, False)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "padding_mode",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.bias is None
    assert "rank=(2, 2)" in repr(ours) and "tucker2" in repr(ours)


def test_ranks_as_text() -> None:
    assert FactorizedConv2d(8, 6, 3, rank="3,2").rank == (3, 2)
    assert FactorizedConv2d(8, 6, 3, rank="0.5").rank == FactorizedConv2d(8, 6, 3, rank=0.5).rank
    dense = nn.Conv2d(8, 6, 3)
    by_rule = FactorizedConv2d.from_conv(dense, rank=Energy(0.8))
    assert FactorizedConv2d.from_conv(dense, rank="energy:0.8").rank == by_rule.rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "vbmf"}, "for a layer without weights, got"),
        ({"rank": "many"}, "unknown rank rule 'many'"),
        ({"groups": 2}, "groups must be 1, got 2"),
        ({"padding_mode": "reflect"}, "padding_mode must be 'zeros', got 'reflect'"),
        ({"stride": 0}, "stride must be"),
        ({"padding": -1}, "padding must be"),
        ({"padding": "full"}, "padding must be ints, 'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, "needs stride 1"),
        ({"dilation": (1, 2, 3)}, "dilation must be"),
        ({"format": "svd"}, "for conv layers, got 'svd'"),
        ({"rank": 0}, "rank|R_out"),
        ({"rank": (2, 0)}, "R_in must be at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactorizedConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, "rank": (2, 2), **options})


def test_unfit_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="groups must be 1, got 4"):
        FactorizedConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), rank=2)
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'circular'"):
        FactorizedConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), rank=2)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Conv2d, got ConvTranspose2d"):
        FactorizedConv2d.from_conv(nn.ConvTranspose2d(4, 4, 3), rank=2)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Linear, got Conv1d"):
        FactorizedLinear.from_linear(nn.Conv1d(4, 4, 1), rank=2)
    with pytest.raises(ValueError, match="rank is needed"):
        FactorizedConv1d.from_conv(nn.Conv1d(4, 4, 3))


def test_input_smaller_than_kernel() -> None:
    layer = FactorizedConv3d(2, 3, 3, rank=(2, 2))
    with pytest.raises(
        ValueError, match=r"padded input \[5, 2, 5\] is smaller than the dilated kernel \[3, 3, 3\]"
    ):
        layer(torch.randn(1, 2, 5, 2, 5))


@pytest.mark.parametrize(
    "change",
    [
        {"type": "Linear"},
        {"format": "pickle"},
        {"rank": "many"},
        {"rank": [0, 1]},
        {"in_channels": "4"},
        {"dtype": "int8"},
        {"stride": None},
    ],
    ids=str,
)
def test_hostile_config(change: dict[str, Any]) -> None:
    config = FactorizedConv2d(4, 6, 3, rank=(2, 2)).config()
    with pytest.raises(ValueError):
        from_config({**config, **change})
    config.pop("kernel_size")
    with pytest.raises(ValueError, match="kernel_size"):
        from_config(config)


def test_training_moves_all_factors() -> None:
    layer = FactorizedConv2d(3, 8, 3, padding=1, rank=(4, 3))
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x, target = torch.randn(4, 3, 6, 6), torch.randn(4, 8, 6, 6)
    first = last = 0.0
    for step in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), loss.item()) if step == 0 else (first, loss.item())
    assert last < first
    assert all(not torch.equal(b, p) for b, p in zip(before, layer.parameters(), strict=True))
