"""Kernels that a type of device has not tried yet: what is chosen there, and how tune compares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from tensorcomp_ext.ops import Support
from tensorcomp_ext.plan import Partial, PlannedLayer, agree, cost, get_plan, plans_for, tune, tuner
from tensorcomp_ext.plan.agree import disagreements
from tensorcomp_ext.plan.rates import Rates
from tensorcomp_ext.plan.select import candidates, choose, traced_plan


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> FactorizedConv2d:
    """A layer whose own kernels serve everywhere and are predicted far ahead."""
    slow, fast = dict.fromkeys((8, 32, 128), 1e9), dict.fromkeys((8, 32, 128), 1e12)
    speeds = {"conv": slow, "pointwise": slow, "linear": slow, "fused": fast, "partial": slow}
    monkeypatch.setattr(cost, "rates", lambda *_: Rates(speeds, 1e12, 1e-6))
    for cls in (Partial, type(get_plan("fused"))):
        monkeypatch.setattr(cls, "support", lambda *_: Support(True))
    return FactorizedConv2d(16, 16, 3, padding=1, rank=(8, 8))


def test_untried_kernels_wait_for_tune(layer: FactorizedConv2d) -> None:
    here = layer.case(torch.empty(2, 16, 9, 9), training=False)
    there = here._replace(device="cuda")
    assert choose(layer, here).name == "fused"
    assert choose(layer, there).name != "fused"
    reason = {c.name: c.reason for c in candidates(layer, there)}["fused"]
    assert reason == "tune compares its results with the library's before it is chosen here"
    layer.tuned = {str(there): {"plan": "fused", "seconds": {"fused": 1e-6, "dense": 2e-6}}}
    assert choose(layer, there).name == "fused"
    layer.tuned = {}
    layer.plan = "fused"
    assert choose(layer, there).name == "fused"


def test_untried_kernels_are_not_traced(layer: FactorizedConv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    assert traced_plan(layer, training=False) == "fused"
    monkeypatch.setattr("tensorcomp_ext.plan.select.TRIED_DEVICES", ())
    assert traced_plan(layer, training=False) == "staged"


def calls(own: Any, library: Any) -> dict[str, Callable[[], object]]:
    return {"dense": lambda: None, "staged": lambda: library, "fused": lambda: own}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_roundings_agree_and_mistakes_do_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = torch.randn(64, 64)
    rounded = exact * (1 + 2 * torch.finfo(dtype).eps * torch.randn(64, 64))
    assert disagreements(calls(rounded.to(dtype), exact.to(dtype))) == {}
    mistaken = exact.clone()
    mistaken[5] = mistaken[6]
    found = disagreements(calls(mistaken.to(dtype), exact.to(dtype)))
    assert list(found) == ["fused"]
    assert "differ from the library's" in found["fused"]


@pytest.mark.parametrize("wrong", [torch.full((3,), float("nan")), torch.ones(4), torch.ones(3).double()])
def test_other_kinds_of_mistakes(wrong: Tensor) -> None:
    expected = torch.ones(3)
    assert disagreements(calls((expected, wrong), (expected, expected))).keys() == {"fused"}


def test_where_the_library_overflows_nothing_is_compared() -> None:
    overflow = torch.tensor([float("inf"), 1.0])
    assert disagreements(calls(overflow, overflow)) == {}
    assert disagreements({"dense": lambda: overflow}) == {}


def test_some_plan_of_the_library_is_compared_with() -> None:
    right, wrong = torch.ones(3), torch.zeros(3)
    for library in ("staged", "merged", "dense"):
        assert disagreements({library: lambda: right, "fused": lambda: right, "pair": lambda: right}) == {}
        found = disagreements({library: lambda: right, "fused": lambda: wrong, "pair": lambda: right})
        assert list(found) == ["fused"]
    assert disagreements({"dense": lambda: wrong, "staged": lambda: right, "fused": lambda: right}) == {}
    (reason,) = disagreements({"fused": lambda: right}).values()
    assert reason.startswith("no plan of the library serves here")


def other_layers() -> dict[str, tuple[PlannedLayer, Tensor]]:
    torch.manual_seed(0)
    tt = FactorizedLinear(24, 30, format="tt", rank=4, in_modes=(2, 3, 4), out_modes=(5, 2, 3))
    table = FactorizedEmbedding(60, 24, rank=4, format="ttm")
    return {
        "network": (tt, torch.randn(9, 24)),
        "pair": (FactorizedLinear(24, 30, rank=4), torch.randn(9, 24)),
        "embedding": (table, torch.randint(60, (40,))),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["network", "pair", "embedding"])
def test_untried_kernels_of_other_layers(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not chosen unless tuned or forced; tune compares them."""
    layer, x = other_layers()[name]
    own = [plan.name for plan in plans_for(layer) if plan.own_kernels]
    assert "fused" in own and ("pair" in own) == (name == "network")
    for module in ("select", "tuner"):
        monkeypatch.setattr(f"tensorcomp_ext.plan.{module}.TRIED_DEVICES", ())
    for candidate in layer.plans(x, training=training):
        if candidate.name in own:
            waits = "tune compares its results" if candidate.available.ok else candidate.available.reason
            assert not candidate.chosen and candidate.reason.startswith(waits)
    assert traced_plan(layer, training) not in own
    compared: list[str] = []

    def compare(calls: Mapping[str, Callable[[], object]]) -> dict[str, str]:
        compared.extend(calls)
        return agree.disagreements(calls)

    monkeypatch.setattr(tuner, "disagreements", compare)
    found = tune(layer, x, training=training, min_seconds=1e-4).layers[0]
    assert "staged" in compared and not any("differ" in text for text in found.unavailable.values())
    served = [plan for plan in own if get_plan(plan).support(layer, layer.case(x, training)).ok]
    for plan in served:
        assert plan in found.timings or "the same products" in found.unavailable[plan]
        layer.plan = plan
        assert choose(layer, layer.case(x, training)).name == plan
        layer.plan = None


@pytest.mark.parametrize("training", [False, True])
def test_tune_leaves_wrong_kernels_out(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that counts as untried: right kernels take part, wrong ones are listed with the reason."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 9, 9)
    monkeypatch.setattr(tuner, "TRIED_DEVICES", ())
    # Sizes at which the two ways add in different orders.
    layer = FactorizedConv2d(40, 40, 3, padding=1, rank=(19, 17))
    right = tune(layer, x, training=training, min_seconds=1e-3).layers[0]
    assert {"dense", "staged"} <= right.timings.keys() and "fused" not in right.unavailable
    monkeypatch.setattr(agree, "_LIMITS", {torch.float32: 1e-12})
    wrong = tune(layer, x, training=training, min_seconds=1e-3).layers[0]
    assert "fused" not in wrong.timings and "differ from the library's" in wrong.unavailable["fused"]
