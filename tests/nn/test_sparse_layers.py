"""Layers with a sparse part: grouped convolutions, finalizing, masks that change between calls, plans."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorcomp_ext as tc
from tensorcomp_ext import _native
from tensorcomp_ext.formats import LowRankSparse, PackedLowRankSparse
from tensorcomp_ext.nn import FactorizedConv1d, FactorizedConv2d, FactorizedConv3d, FactorizedLinear
from tensorcomp_ext.plan import plans_for

MODES = ("additive", "masking")


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def pruned(layer: Any, share: float = 0.1) -> Any:
    layer.weight.keep(torch.rand(layer.weight.shape) < share)
    return layer


GROUPED: list[tuple[Any, Any, Any, tuple[int, ...]]] = [
    (FactorizedConv1d, nn.Conv1d(8, 12, 3, padding=1, groups=4), "tt", (2, 8, 9)),
    (FactorizedConv2d, nn.Conv2d(9, 9, 5, padding=2, groups=9, bias=False), "cp", (2, 9, 7, 6)),
    (FactorizedConv2d, nn.Conv2d(8, 12, 3, stride=2, groups=2), "tucker2", (2, 8, 7, 6)),
    (FactorizedConv2d, nn.Conv2d(6, 6, 3, padding="same", groups=6), "none", (3, 6, 5, 5)),
    (FactorizedConv3d, nn.Conv3d(4, 6, (1, 3, 2), groups=2), "svd", (2, 4, 3, 5, 4)),
]


@pytest.mark.parametrize("cls,dense,low_rank,shape", GROUPED, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("mode", MODES)
def test_grouped_convolutions(cls: Any, dense: Any, low_rank: str, shape: Any, mode: str) -> None:
    rank: Any = () if low_rank == "none" else 2
    options = {"format": "lowrank_sparse", "low_rank": low_rank, "mode": mode}
    layer = cls.from_conv(dense, rank=rank, **options)
    x = torch.randn(shape)
    assert relative(layer(x), dense(x)) < 1e-6
    pruned(layer, 0.3)
    expected = layer.to_dense().double()(x.double())
    assert type(layer.to_dense()) is type(dense) and layer.to_dense().groups == dense.groups
    for found in (layer, copy.deepcopy(layer).finalize()):
        for plan in plans_for(found):
            if plan.support(found, found.case(x)).ok:
                found.plan = plan.name
                with torch.no_grad():
                    assert relative(found(x), expected) < 1e-5, plan.name
                assert relative(found(x), expected) < 1e-5, plan.name
        found.plan = None
        assert relative(found.to_sequential()(x), expected) < 1e-5
        twin = tc.nn.from_config(json.loads(json.dumps(found.config())))
        twin.load_state_dict(found.state_dict())
        assert relative(twin(x), expected) < 1e-5
        assert found.dense_macs(shape) == expected[:, 0].numel() * dense.weight.numel()
    layer.reset_parameters()
    layer(x).sum().backward()


def test_groups_of_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="groups must be 1, got 2: format 'tucker2' takes no others"):
        FactorizedConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2), rank=2)
    with pytest.raises(ValueError, match="groups must be an int >= 1, got 0"):
        FactorizedConv2d(4, 4, 3, groups=0, rank=2)
    with pytest.raises(ValueError, match="in_channels must be a multiple of groups = 3, got 4"):
        FactorizedConv2d(4, 6, 3, groups=3, format="lowrank_sparse", rank=1)


@pytest.mark.parametrize("mode", MODES)
def test_masks_that_change_are_noticed(mode: str) -> None:
    """Prepared weights belong to the mask they were made from, in training and without gradients."""
    layer = FactorizedLinear(12, 10, format="lowrank_sparse", rank=2, mode=mode)
    x = torch.randn(3, 12)
    for share in (0.8, 0.4, 0.0):
        pruned(layer, share)
        expected = layer.to_dense()(x)
        for _ in range(2):
            with torch.no_grad():
                assert relative(layer(x), expected) < 1e-5
            assert relative(layer(x), expected) < 1e-5
    prepared = layer._prepared
    with torch.no_grad():
        layer(x)
    assert layer._prepared is prepared is not None
    layer.weight.sparse.data = layer.weight.sparse.data.clone()
    with torch.no_grad():
        layer.weight.low_rank.a.add_(1.0)
        assert relative(layer(x), layer.to_dense()(x)) < 1e-5


def test_optimizer_steps_are_noticed() -> None:
    layer = pruned(FactorizedLinear(12, 10, format="lowrank_sparse", rank=2), 0.5)
    x, optimizer = torch.randn(3, 12), torch.optim.SGD(layer.parameters(), lr=0.1)
    hidden = layer.weight.sparse.detach()[~layer.weight.kept].clone()
    for _ in range(3):
        with torch.no_grad():
            before = layer(x)
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert relative(layer(x), before) > 1e-3
            assert relative(layer(x), layer.to_dense()(x)) < 1e-5
    assert torch.equal(layer.weight.sparse.detach()[~layer.weight.kept], hidden)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("low_rank", ["svd", "tt", "ttm", "none"])
def test_finalized_linear_layers(low_rank: str, mode: str) -> None:
    rank: Any = () if low_rank == "none" else 3
    layer = FactorizedLinear(40, 30, format="lowrank_sparse", rank=rank, low_rank=low_rank, mode=mode)
    nn.init.normal_(layer.bias)
    layer.tuned = {}
    x = torch.randn(2, 5, 40)
    expected = pruned(layer).double().to_dense()(x.double())
    layer.float().eval()
    bias = layer.bias
    assert layer.finalize() is layer and layer.finalize() is layer
    assert isinstance(layer.weight, PackedLowRankSparse) and layer.bias is bias and not layer.weight.training
    assert layer.format == "lowrank_sparse_packed"
    names = [plan.name for plan in plans_for(layer)]
    assert ("fused" in names) == (low_rank != "ttm")
    for plan in plans_for(layer):
        if not plan.support(layer, layer.case(x)).ok:
            continue
        layer.plan = plan.name
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                assert relative(layer(x), expected) < 1e-5
                assert layer(x[:0]).shape == (0, 5, 30)
    frozen = FactorizedLinear.from_linear(
        nn.Linear(40, 30).requires_grad_(False), "lowrank_sparse", rank, low_rank=low_rank
    ).finalize()
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [0.05, 0.4])
def test_finalized_layers_at_any_number_of_rows(kept: float, dtype: torch.dtype) -> None:
    """Few rows go through panels, many through the entries as they are stored; a change reaches both."""
    layer = FactorizedLinear(40, 30, format="lowrank_sparse", rank=3).requires_grad_(False)
    layer = pruned(layer, kept).eval().finalize().to(dtype)
    layer.plan = "fused" if _native.status().ok else "dense"
    for _ in range(2):
        expected = copy.deepcopy(layer).double().to_dense()
        for rows in (1, 63, 64, 127, 128, 200):
            x = torch.randn(rows, 40, dtype=dtype)
            with torch.no_grad():
                assert relative(layer(x), expected(x.double())) < (1e-5 if dtype == torch.float32 else 1e-2)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.5)


def test_other_formats_have_nothing_to_finalize() -> None:
    layer = FactorizedLinear(6, 5, rank=2)
    weight = layer.weight
    assert layer.finalize().weight is weight


def pointwise(layout: torch.memory_format, **geometry: Any) -> tuple[Any, Tensor]:
    layer = FactorizedConv2d(20, 30, 1, format="lowrank_sparse", rank=(3, 2), **geometry)
    nn.init.normal_(layer.bias)
    return pruned(layer).finalize(), torch.randn(2, 20, 5, 6).contiguous(memory_format=layout)


def test_pointwise_convolutions_take_the_linear_kernel() -> None:
    layer, x = pointwise(torch.channels_last)
    assert "fused" in [plan.name for plan in plans_for(layer)]
    expected = layer.to_dense().double()(x.double())
    if any(p.name == "fused" and p.support(layer, layer.case(x)).ok for p in plans_for(layer)):
        layer.plan = "fused"
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                y = layer(x)
            assert relative(y, expected) < 1e-5 and y.shape == expected.shape
            assert y.is_contiguous(memory_format=torch.channels_last)
    contiguous = x.contiguous()
    refused = next(c for c in layer.plans(contiguous) if c.name == "fused")
    assert not refused.available.ok
    for geometry in ({"stride": 2}, {"padding": 1}):
        other, _ = pointwise(torch.channels_last, **geometry)
        assert "fused" not in [plan.name for plan in plans_for(other)]


@pytest.mark.parametrize("rows", [(7,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_training_without_the_sum_of_both_parts(rows: tuple[int, ...], bias: bool) -> None:
    """The plan "staged" and its gradients are those of the dense weight."""
    layer = FactorizedLinear(40, 30, bias, format="lowrank_sparse", rank=3)
    pruned(layer)
    x, dy = torch.randn(*rows, 40, requires_grad=True), torch.randn(*rows, 30)
    parameters, found = dict(layer.named_parameters()), {}
    for plan in ("dense", "staged"):
        layer.plan = plan
        for _ in range(2):  # the second call goes through what the first one kept
            y = layer(x)
        found[plan] = [y.detach(), *torch.autograd.grad(y, [x, *parameters.values()], dy)]
        with torch.no_grad():
            assert torch.allclose(layer(x), y, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(found["staged"], found["dense"], strict=True):
        assert ours.shape == expected.shape
        assert not ours.numel() or not expected.any() or relative(ours, expected) < 1e-5
    of_sparse = found["staged"][2 + list(parameters).index("weight.sparse")]
    assert not of_sparse[~layer.weight.kept].any()
    layer.plan = None
    for training in (True, False):
        staged = {c.name: c for c in layer.plans(x, training=training)}["staged"]
        assert staged.available.ok == training
        assert staged.macs == math.prod(rows) * (30 * 40 + 3 * (30 + 40))


def test_only_additive_pairs_are_multiplied_apart() -> None:
    for options in ({"mode": "masking"}, {"low_rank": "tt"}):
        layer = FactorizedLinear(40, 30, format="lowrank_sparse", rank=3, **options)
        assert "staged" not in [plan.name for plan in plans_for(layer)]


def test_plans_count_what_they_do() -> None:
    layer = pruned(FactorizedLinear(64, 48, format="lowrank_sparse", rank=4)).finalize()
    found = {c.name: c for c in layer.plans(torch.randn(7, 64), training=False)}
    assert found["dense"].macs == 7 * 64 * 48
    assert found["fused"].macs == 7 * (4 * (64 + 48) + layer.weight.nnz) == layer.macs((7, 64))
    assert all(c.predicted > 0 for c in found.values())


def test_tuning_and_saving(tmp_path: Any) -> None:
    net = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Conv1d(5, 6, 3))
    x = torch.randn(5, 24)
    layers = nn.Sequential(
        FactorizedLinear.from_linear(net[0], "lowrank_sparse", 2, mode="masking"),
        nn.ReLU(),
        FactorizedConv1d.from_conv(net[2], "lowrank_sparse", (2, 2), low_rank="tucker2"),
    )
    for place in (0, 2):
        pruned(layers[place], 0.3)
    for finalized in (False, True):
        if finalized:
            for place in (0, 2):
                layers[place].finalize()
        result = tc.tune(layers, x, min_seconds=0.001)
        assert len(result.layers) == 2
        with torch.no_grad():
            expected = layers(x)
        path = tmp_path / f"net{finalized}.safetensors"
        tc.save(layers, path)
        fresh = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Conv1d(5, 6, 3))
        loaded = tc.load(path, fresh)
        assert type(loaded[0].weight) is (PackedLowRankSparse if finalized else LowRankSparse)
        with torch.no_grad():
            assert torch.equal(loaded(x), expected)
    assert path.stat().st_size < (tmp_path / "netFalse.safetensors").stat().st_size
