"""Every plan of every format computes the dense layer; orders, refusals and costs of core networks."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorcomp_ext.nn import FactorizedConv1d, FactorizedConv2d, FactorizedConv3d, FactorizedLinear
from tensorcomp_ext.plan import (
    PlannedLayer,
    cost,
    export_choices,
    get_plan,
    import_choices,
    networks,
    plans_for,
    rates,
    tune,
)
from tensorcomp_ext.plan.base import offered

_RATES = rates.Rates(
    {kind: {8: 1e10, 64: 4e10} for kind in ("conv", "pointwise", "linear", "fused", "pair", "chain")},
    1e10,
    2e-6,
    4e10,
)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "rates", lambda *_: _RATES)


def linear(format: str, rank: Any, **modes: Any) -> FactorizedLinear:
    torch.manual_seed(0)
    return FactorizedLinear(24, 30, format=format, rank=rank, **modes)


THREE = {"in_modes": (2, 3, 4), "out_modes": (5, 2, 3)}
TWO = {"in_modes": (6, 4), "out_modes": (5, 6)}
LINEAR: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "svd": ("svd", 4, {}),
    "tt": ("tt", (2, 5, 4, 3, 2), THREE),
    "tt of rank 1": ("tt", 1, THREE),
    "tt, columns in another order": ("tt", 3, {**THREE, "input_order": (2, 0, 1)}),
    "tr": ("tr", (2, 3, 2, 3, 2, 3), THREE),
    "ttm": ("ttm", (3, 4), THREE),
    "tr_matrix": ("tr_matrix", (2, 3, 2), THREE),
    "cp": ("cp", 5, TWO),
    "tucker": ("tucker", (3, 4, 3, 2), TWO),
}
CONV = {"cp": 5, "tr": (2, 3, 4), "tt": (3, 4), "tucker": 3, "ttm": (3,), "tucker2": (3, 4)}
EVERY = ("dense", "packed", "staged", "merged", "fused", "pair", "partial")
_WAYS = {1: FactorizedConv1d, 2: FactorizedConv2d, 3: FactorizedConv3d}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """With one, PyTorch convolves small volumes by another algorithm, whose results are contiguous."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def gradients(y: Tensor, layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(y, [x, *layer.parameters()], torch.randn(y.shape))


def check_every_plan(layer: PlannedLayer, x: Tensor) -> set[str]:
    """Bound, functional and trained calls of all plans against the dense ones; the plans that ran."""
    dense = get_plan("dense")
    with torch.no_grad():
        expected = dense.run(layer, x)
    leaf = x.clone().requires_grad_()
    wanted = gradients(dense.run(layer, leaf), layer, leaf)
    ran = set()
    for plan in plans_for(layer):
        for prefer in ("latency", "memory"):
            layer.prefer = prefer
            with torch.no_grad():
                if plan.support(layer, layer.case(x, False)).ok:
                    for y in (layer.executor(plan, x)(x, layer.bias), plan.run(layer, x)):
                        assert y.shape == expected.shape and relative(y, expected) <= 1e-5, plan.name
                    ran.add(plan.name)
        layer.prefer = "latency"
        case = layer.case(x, True)
        if plan.support(layer, case).ok:
            for call in (plan.bind_training(layer, case), plan.run):
                y = call(layer, leaf)
                assert relative(y.detach(), expected) <= 1e-5, plan.name
                for found, right in zip(gradients(y, layer, leaf), wanted, strict=True):
                    assert relative(found, right) <= 1e-4, plan.name
    return ran


@pytest.mark.parametrize("name", LINEAR)
def test_every_plan_of_a_linear_layer(name: str) -> None:
    format, rank, modes = LINEAR[name]
    layer = linear(format, rank, **modes)
    for x in (torch.randn(7, 24), torch.randn(2, 3, 24), torch.randn(24, 5).t()):
        ran = check_every_plan(layer, x)
        assert {"dense", "staged"} <= ran
        assert ("merged" in ran) == (format != "svd")
    assert layer(torch.randn(0, 24)).shape == (0, 30)


@pytest.mark.parametrize("spatial", _WAYS)
@pytest.mark.parametrize("format", CONV)
def test_every_plan_of_a_convolution(format: str, spatial: int) -> None:
    torch.manual_seed(0)
    layer = _WAYS[spatial](6, 8, 3, stride=2, padding=1, format=format, rank=CONV[format])
    x = torch.randn(2, 6, *(7,) * spatial)
    assert {"dense", "staged"} <= check_every_plan(layer, x)
    if spatial == 2:
        check_every_plan(layer, x.contiguous(memory_format=torch.channels_last))
        for plan in ("staged", "dense"):
            layer.plan = plan
            assert layer(x[:0]).shape == (0, 8, 4, 4)


@pytest.mark.parametrize("rank", [(2, 3, 4), (2, 1, 1), (3, 1, 2)])
@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.usefixtures("two_threads")
def test_rings_keep_the_layout(spatial: int, rank: tuple[int, ...]) -> None:
    """Of channels-last images the dense layer makes channels-last ones."""
    torch.manual_seed(0)
    layer = _WAYS[spatial](6, 8, 3, stride=2, padding=1, format="tr", rank=rank)
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[spatial]
    for batch in (0, 1, 2):
        for layout in (torch.contiguous_format, last):
            x = torch.randn(batch, 6, *(7,) * spatial).contiguous(memory_format=layout)
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    layer.plan = "staged"
                    y = layer(x)
                    layer.plan = "dense"
                    expected = layer(x)
                assert y.shape == expected.shape
                if batch:
                    assert y.stride() == expected.stride()
                    assert relative(y.detach(), expected.detach()) <= 1e-5


@pytest.mark.parametrize("name", ["tt", "ttm", "cp", "tucker"])
def test_autocast(name: str) -> None:
    format, rank, modes = LINEAR[name]
    layer, x = linear(format, rank, **modes), torch.randn(7, 24)
    with torch.no_grad():
        expected = layer(x)
    for plan in ("staged", "merged"):
        layer.plan = plan
        for grad in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
                for _ in range(2):
                    y = layer(x)
                    assert y.dtype == torch.bfloat16 and relative(y.detach().float(), expected) <= 2e-2


def test_candidates_say_what_they_do() -> None:
    layer = linear(*LINEAR["tt"][:2], **THREE)
    found = {c.name: c for c in layer.plans(torch.randn(64, 24), training=False)}
    assert [*found] and set(found) == {"dense", "staged", "merged", "fused", "pair"}
    assert found["staged"].program.startswith("x·") and found["dense"].program == ""
    for name in ("merged", "pair"):
        if found[name].program == found[{"merged": "staged", "pair": "fused"}[name]].program:
            assert not found[name].available.ok
    for candidate in found.values():
        assert json.loads(json.dumps(candidate.to_dict()))["program"] == candidate.program


def test_a_plan_that_repeats_another_is_not_offered_but_runs_where_forced() -> None:
    layer = FactorizedLinear(64, 64, format="tt", rank=4, in_modes=(8, 8), out_modes=(8, 8))
    x = torch.randn(4096, 64)
    staged, merged = get_plan("staged"), get_plan("merged")
    case = layer.case(x, False)
    assert staged.program(layer, case) == merged.program(layer, case) == "x·(G2 G3)·(G0 G1)"
    support = offered(merged, layer, case)
    assert not support.ok and support.reason == "the same products as 'staged': x·(G2 G3)·(G0 G1)"
    expected = layer(x)
    layer.plan = "merged"
    assert relative(layer(x).detach(), expected.detach()) <= 1e-6


def test_the_order_follows_the_rows() -> None:
    """In training the cores are merged at each call, which a single row does not pay."""
    layer = FactorizedLinear(4096, 4096, format="tt", rank=16, in_modes=(16,) * 3, out_modes=(16,) * 3)
    staged = get_plan("staged")
    one, many = (layer.case(torch.empty(rows, 4096), True) for rows in (1, 4096))
    assert staged.program(layer, one) != staged.program(layer, many) == "x·(G3 G4 G5)·(G0 G1 G2)"
    macs = {rows: sum(s.macs for s in staged.stages(layer, c)) for rows, c in ((1, one), (4096, many))}
    assert macs[1] < 4096 * 4096 // 8 and macs[4096] < 4096 * 2**18


def test_memory_keeps_no_large_factors() -> None:
    layer = FactorizedLinear(256, 256, format="cp", rank=64, in_modes=(16, 16), out_modes=(16, 16))
    layer.prefer = "memory"
    x = torch.randn(3, 256)
    support = get_plan("merged").support(layer, layer.case(x, False))
    assert support.reason == "prefer='memory': merged factors would be too large to be kept"
    layer.plan = "staged"
    with pytest.raises(ValueError, match="plan 'staged' cannot serve: prefer='memory'"):
        layer(x)
    layer.prefer = "latency"
    assert layer(x).shape == (3, 256)


def test_a_single_core_has_no_order() -> None:
    layer = FactorizedLinear(6, 5, format="ttm", rank=1, in_modes=(6,), out_modes=(5,))
    x = torch.randn(3, 6)
    assert get_plan("staged").support(layer, layer.case(x, False)).reason == "the weight is one core"
    assert layer(x).shape == (3, 5)
    assert torch.compile(layer, backend="eager", fullgraph=True)(x).shape == (3, 5)


@pytest.mark.parametrize("name", ["tt", "tr", "ttm", "cp", "tucker"])
def test_graphs_follow_an_order_fixed_beforehand(name: str) -> None:
    format, rank, modes = LINEAR[name]
    layer = linear(format, rank, **modes)
    torch.compiler.reset()
    for plan in (None, "staged", "merged", "fused", "pair"):
        layer.plan = plan
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        for rows in (5, 9):
            x = torch.randn(rows, 24, requires_grad=True)
            y = compiled(x)
            expected = get_plan("dense").run(layer, x)
            assert relative(y.detach(), expected.detach()) <= 1e-5
            for found, right in zip(gradients(y, layer, x), gradients(expected, layer, x), strict=True):
                assert relative(found, right) <= 1e-4
        torch.compiler.reset()


def test_tuned_choices_travel() -> None:
    model = nn.Sequential(linear("ttm", (3, 4), **THREE), nn.ReLU())
    for training in (False, True):
        result = tune(model, torch.randn(6, 24), training=training, min_seconds=0.001)
        (layer,) = result.layers
        assert layer.choice in layer.timings and "dense" in layer.timings and "staged" in layer.timings
        best = min(t.median for t in layer.timings.values())
        assert layer.timings[layer.choice].median <= 1.03 * best
    other = copy.deepcopy(model)
    other[0].tuned = {}
    assert import_choices(other, json.loads(json.dumps(export_choices(model)))) == 2
    assert other[0].tuned == model[0].tuned


def test_what_is_computed_again_in_backward_counts() -> None:
    """The chain kernel does so within the cache; a convolution in a second pass; rings less so on CPUs."""
    plan = get_plan("fused")
    conv = FactorizedConv2d(6, 8, 3, format="tucker2", rank=(3, 4))
    ring = FactorizedConv2d(6, 8, 3, format="tr", rank=2)
    chained = [plan.backward_factor(linear(*LINEAR[name][:2], **LINEAR[name][2])) for name in ("svd", "tt")]
    again, ringed = (plan.backward_factor(layer) for layer in (conv, ring))
    assert chained[0] == chained[1] == get_plan("pair").backward_factor(linear("tt", 3, **THREE))
    assert ringed < 3.0 < chained[0] < again
    staged = get_plan("staged")
    assert staged.backward_factor(conv) == 3.0 < staged.backward_factor(ring)


def test_cost_of_a_chain() -> None:
    layer = linear("ttm", (3, 4), **THREE)
    case = layer.case(torch.empty(100, 24), False)
    for name in ("staged", "fused"):
        plan = get_plan(name)
        stages = plan.stages(layer, case)
        assert plan.program(layer, case).count("·") == len(stages)
        calls = sum(stage.calls for stage in stages)
        assert calls == (1 if name == "fused" else len(stages))
        assert cost.predict(plan, layer, case) > calls * _RATES.overhead
    found = networks.find(layer, case, networks.LIBRARY, None, 3.0)
    assert found is not None
    assert sum(s.macs for s in get_plan("staged").stages(layer, case)) == 100 * found.chain.program.macs()
