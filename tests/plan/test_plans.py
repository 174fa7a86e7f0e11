"""Cases, candidates, the cost model and the cache of measured rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tensorcomp_ext.nn import FactorizedConv1d, FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.ops import Support
from tensorcomp_ext.plan import Case, Fused, cache, cost, get_plan, plans_for, rates, register_plan
from tensorcomp_ext.plan.memory_format import memory_layout
from tensorcomp_ext.plan.rebuild import part_stages, rebuild_stage


def fixed_rates(fused: float = 2e10) -> rates.Rates:
    table = {"conv": {16: 1e10}, "pointwise": {16: 1e10}, "linear": {16: 1e10}, "fused": {16: fused}}
    return rates.Rates(table, 1e10, 1e-6)


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "rates", lambda *_: fixed_rates())


@pytest.fixture
def fused_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fused, "support", lambda *_: Support(True))


def case_of(shape: tuple[int, ...], training: bool = False, prefer: str = "latency") -> Case:
    return Case(shape, "float32", "contiguous", "cpu", training, 1, prefer)


def test_case_text_round_trip() -> None:
    case = case_of((8, 64, 56, 56), training=True)
    assert str(case) == "8x64x56x56/float32/contiguous/cpu/training/t1/latency"
    assert Case.parse(str(case)) == case
    for text in (
        "",
        "8x64",
        str(case) + "/x",
        str(case).replace("training", "train"),
        "ax1/f/c/cpu/training/t1/l",
    ):
        with pytest.raises(ValueError, match="plan key must read"):
            Case.parse(text)


def test_case_text_says_where_float32_may_be_rounded() -> None:
    case = case_of((8, 64))._replace(device="cuda", tf32=True)
    assert str(case) == "8x64/float32+tf32/contiguous/cuda/inference/t1/latency"
    assert Case.parse(str(case)) == case and case.torch_dtype == torch.float32
    assert case.distance(case._replace(tf32=False), 0) is None


def test_case_distance() -> None:
    case = case_of((8, 64, 7, 7))
    assert case.distance(case_of((8, 64, 7, 7)), 2) == 0
    assert case.distance(case_of((16, 64, 7, 7)), 2) == pytest.approx(
        case.distance(case_of((4, 64, 7, 7)), 2)
    )
    assert case.distance(case_of((8, 64, 7, 8)), 2) is None
    assert case.distance(case_of((8, 64, 7, 7), training=True), 2) is None
    assert case_of((3, 5, 64)).distance(case_of((15, 64)), 0) == 0


def test_memory_layout() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert memory_layout(x) == "contiguous"
    assert memory_layout(x.contiguous(memory_format=torch.channels_last)) == "channels_last"
    assert (
        memory_layout(torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d))
        == "channels_last"
    )
    assert memory_layout(x[:, :, 1:]) == "strided"


def test_candidates_by_layer() -> None:
    image = FactorizedConv2d(4, 4, 3, rank=(2, 2))
    assert [p.name for p in plans_for(image)] == ["dense", "packed", "staged", "fused", "partial"]
    assert [p.name for p in plans_for(FactorizedConv1d(4, 4, 3, rank=(2, 2)))] == ["dense", "staged"]
    assert [p.name for p in plans_for(FactorizedLinear(4, 4, rank=2))] == ["dense", "staged", "fused"]


@pytest.mark.usefixtures("known_rates")
def test_what_cannot_serve_is_listed_with_the_reason() -> None:
    image, matrix = FactorizedConv2d(4, 4, 3, rank=(2, 2)), FactorizedLinear(4, 4, rank=2).double()
    wide = "the native CPU kernels take float32 and bfloat16, not torch.float64"
    for layer, name, x, reason in (
        (image, "partial", torch.randn(1, 4, 5, 5), "for CUDA devices only, not for 'cpu'"),
        (matrix, "fused", torch.randn(3, 4).double(), wide),
    ):
        for training in (False, True):
            entry = next(c for c in layer.plans(x, training=training) if c.name == name)
            assert not entry.available.ok and not entry.chosen and entry.reason == reason
        layer.plan = name
        for context in (torch.no_grad, torch.enable_grad):
            with context(), pytest.raises(ValueError, match=f"plan '{name}' cannot serve: {reason}"):
                layer(x)


@pytest.mark.usefixtures("known_rates", "fused_serves")
def test_counts_of_candidates() -> None:
    layer = FactorizedConv2d(32, 48, 3, stride=2, padding=1, rank=(12, 10))
    x = torch.empty(2, 32, 9, 9)
    found = {c.name: c for c in layer.plans(x, training=False)}
    before, after = 2 * 81, 2 * 25
    factor_macs = before * 320 + after * (9 * 120 + 12 * 48)
    assert found["staged"].macs == found["fused"].macs == factor_macs == layer.macs(x.shape)
    assert found["dense"].macs == after * 9 * 32 * 48 == layer.dense_macs(x.shape)
    stored = 320 + 9 * 120 + 12 * 48
    assert found["fused"].bytes == 4 * (x.numel() + stored + after * 48)
    assert found["staged"].bytes == found["fused"].bytes + 4 * 2 * (before * 10 + after * 12)
    assert found["packed"].bytes == 4 * (x.numel() + 9 * 32 * 48 + after * 48)
    assert found["dense"].bytes == found["packed"].bytes + 4 * 2 * 9 * 32 * 48
    rebuilt = {c.name: c for c in layer.plans(x, training=True)}["dense"]
    assert rebuilt.macs == found["dense"].macs + layer.weight.rebuild_macs()
    layer.prefer = "memory"
    assert {c.name: c for c in layer.plans(x, training=False)}["dense"].macs == rebuilt.macs


@pytest.mark.usefixtures("known_rates", "fused_serves")
def test_cost_model_chooses() -> None:
    x = torch.empty(8, 64, 28, 28)
    small = FactorizedConv2d(64, 64, 3, padding=1, rank=(8, 8)).plans(x, training=False)
    assert small[0].name == "fused" and small[0].chosen and small[0].reason == "predicted fastest"
    assert [c.chosen for c in small] == [True, False, False, False, False]
    assert "x the time of fused" in small[1].reason
    full = FactorizedConv2d(64, 64, 3, padding=1, rank=(64, 64))
    chosen = {c.name: c for c in full.plans(x, training=False)}
    assert chosen["staged"].predicted > chosen["dense"].predicted


@pytest.mark.usefixtures("known_rates")
def test_prediction_is_the_roofline_sum() -> None:
    layer = FactorizedLinear(100, 60, rank=20)
    case = case_of((50, 100))
    first = 1e-6 + max(50 * 2000 / 1e10, 4 * (5000 + 2000 + 1000) / 1e10)
    second = 1e-6 + max(50 * 1200 / 1e10, 4 * (1000 + 1200 + 3000) / 1e10)
    assert cost.predict(get_plan("staged"), layer, case) == pytest.approx(first + second)
    trained = cost.predict(get_plan("staged"), layer, case._replace(training=True))
    assert trained == pytest.approx(2e-6 + 3 * (first + second - 2e-6))


@pytest.mark.usefixtures("known_rates")
def test_tuned_choice_and_nearest_batch() -> None:
    layer = FactorizedConv2d(8, 8, 3, padding=1, rank=(2, 2))
    keys = {n: str(layer.case(torch.empty(n, 8, 5, 5), training=False)) for n in (1, 64)}
    layer.tuned = {
        keys[1]: {"plan": "dense", "seconds": {"dense": 1e-5, "staged": 2e-5}},
        keys[64]: {"plan": "staged", "seconds": {}},
    }
    for batch, name in ((1, "dense"), (2, "dense"), (32, "staged"), (64, "staged"), (900, "staged")):
        assert layer.plans(torch.empty(batch, 8, 5, 5), training=False)[0].name == name
    found = {c.name: c for c in layer.plans(torch.empty(1, 8, 5, 5), training=False)}
    first, second = found["dense"], found["staged"]
    assert (first.measured, first.reason) == (1e-5, "measured fastest")
    assert (second.measured, second.reason) == (2e-5, "measured 2.00x the time of dense")
    assert layer.plans(torch.empty(2, 8, 5, 5), training=False)[0].reason == "tuned at another batch"


def test_forced_plan_that_cannot_serve() -> None:
    layer = FactorizedConv2d(8, 8, 3, rank=(2, 2)).double()
    layer.plan = "fused"
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"plan 'fused' cannot serve: .+"):
        layer(x)
    entry = next(c for c in layer.plans(x) if c.name == "fused")
    assert not entry.available.ok and entry.reason == entry.available.reason != ""
    layer.plan = None
    assert layer(x).shape == (1, 8, 3, 3)


def test_candidate_is_json() -> None:
    layer = FactorizedLinear(6, 5, rank=2)
    for candidate in layer.plans(torch.ones(3, 6)):
        assert json.loads(json.dumps(candidate.to_dict()))["name"] == candidate.name


def test_registry() -> None:
    with pytest.raises(ValueError, match=r"one of \['dense', 'fused', 'merged', .*\], got 'quick'"):
        get_plan("quick")
    with pytest.raises(ValueError, match="'dense' is taken by Dense"):
        register_plan("dense")(Fused)


def test_speed_interpolates() -> None:
    found = rates.Rates({"conv": {8: 1e9, 32: 4e9}})
    assert found.speed("conv", 16) == pytest.approx(2e9)
    assert found.speed("conv", 4) == pytest.approx(5e8)
    assert found.speed("conv", 500) == found.speed("fused", 32) == 4e9


def test_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setenv("TENSORCOMP_CACHE_DIR", str(tmp_path / "deep"))
    monkeypatch.setattr(rates, "_known", {})
    monkeypatch.setattr(rates, "measure", lambda *a: measured.append(a) or fixed_rates(3e9))
    assert rates.rates(torch.float32, "cpu", 3) == fixed_rates(3e9)
    rates._known.clear()
    assert rates.rates(torch.float32, "cpu", 3) == fixed_rates(3e9)
    assert len(measured) == 1
    rates.rates(torch.bfloat16, "cpu", 3)
    assert len(measured) == 2
    assert rates.rates(torch.float32, "meta", 3) == rates.Rates()


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"version": 99, "entries": {}}', '{"version": 1, "entries": 4}']
)
def test_damaged_cache_is_rewritten(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(damage)
    assert cache.load(path) == {}
    assert cache.store(path, "key", {"a": 1})
    assert cache.load(path) == {"key": {"a": 1}}
    assert [p.name for p in tmp_path.iterdir()] == ["rates.json"]


def test_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert not cache.store(blocked / "rates.json", "key", 1)


@pytest.mark.parametrize(
    "content", [None, 3, {}, {"macs": {}}, {"macs": {"conv": {"8": -1}}, "bandwidth": 1, "overhead": 0}]
)
def test_damaged_rates_are_ignored(content: object) -> None:
    assert rates.Rates.from_dict(content) is None


def test_measured_rates_are_usable() -> None:
    found = rates.measure(torch.float32, "cpu")
    assert set(found.macs) >= {"conv", "pointwise", "linear"}
    assert rates.Rates.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_parameters_of_one_form_only() -> None:
    layer = FactorizedConv1d(6, 5, 3, rank=(2, 2))
    with pytest.raises(
        TypeError, match="two-dimensional bottleneck convolutions, linear layers and embeddings"
    ):
        get_plan("fused").run(layer, torch.ones(1, 6, 9))


def test_price_of_a_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernel makes all products in one call each way; the library's follow one another."""
    layer = FactorizedConv2d(16, 16, 3, format="tr", rank=4, in_modes=(4, 4), out_modes=(4, 4))
    case, macs = case_of((1, 16, 8, 8)), layer.weight.rebuild_macs()
    for natively in (True, False):
        monkeypatch.setattr(type(layer.weight), "rebuilds_natively", lambda self, found=natively: found)
        once, trained = (rebuild_stage(layer, case._replace(training=t)) for t in (False, True))
        assert once.macs == trained.macs == macs
        assert once.elements == layer.weight.numel + layer.weight.shape.numel()
        if natively:
            assert once.kind == trained.kind == "chain" and (once.calls, trained.calls) == (1, 2)
        else:
            assert once == trained and once.kind == "linear" and once.calls == 4 and once.width == 4


def test_price_of_parts() -> None:
    """Training merges the cores of a ring at each call; Tucker-2's factors are its parts."""
    case = case_of((1, 16, 8, 8))
    ring = FactorizedConv2d(16, 16, 3, format="tr", rank=4, in_modes=(4, 4), out_modes=(4, 4))
    trained = part_stages(ring, case._replace(training=True))
    assert [stage.macs for stage in trained] == [4**5] * 2
    assert [stage.elements for stage in trained] == [2 * 4**3 + 4**4] * 2
    assert part_stages(ring, case) == []
    plain = FactorizedConv2d(16, 16, 3, rank=(4, 4))
    assert part_stages(plain, case._replace(training=True)) == []
    for name in ("fused", "staged"):
        once, each = (get_plan(name).stages(ring, case._replace(training=t)) for t in (False, True))
        assert each == [*trained, *once]
