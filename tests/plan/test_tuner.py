"""Tuning: what is recorded, chosen, kept on an interrupt, and carried over as JSON."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.plan import (
    LayerTuning,
    Timing,
    TuneResult,
    export_choices,
    get_plan,
    import_choices,
    tune,
    tuner,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = FactorizedConv2d(3, 8, 3, padding=1, rank=(4, 3))
        self.norm = nn.BatchNorm2d(8)
        self.second = FactorizedConv2d(8, 8, 3, padding=1, rank=(3, 3))
        self.third = FactorizedConv2d(8, 8, 3, padding=1, rank=(3, 3))
        self.drop = nn.Dropout(0.5)
        self.unused = FactorizedLinear(4, 4, rank=2)
        self.head = FactorizedLinear(8, 5, rank=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.norm(self.first(x))))
        out: Tensor = self.head(self.drop(x.mean((2, 3))))
        return out


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Times that a test sets, in place of measured ones."""
    medians = {"dense": 2e-5, "packed": 4e-5, "staged": 1e-5, "fused": 3e-5}

    def timed(calls: dict[str, Any], seconds: float, device: str = "cpu") -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {name: Timing(medians[name], medians[name], medians[name], 5) for name in calls}

    monkeypatch.setattr(tuner, "time_interleaved", timed)
    return medians


X = torch.randn(2, 3, 6, 5)


def test_choices_follow_the_medians(stopwatch: dict[str, float]) -> None:
    model = Net()
    result = tune(model, X)
    assert {entry.layer: entry.choice for entry in result.layers} == dict.fromkeys(
        ["first", "second", "third", "head"], "staged"
    )
    assert model.unused.tuned == {}
    assert model.first.plans(X, training=False)[0].reason == "measured fastest"
    with torch.no_grad():
        model(X)
    assert {p.name for p in model.second._chosen.values()} == {"staged"}
    stopwatch["dense"] = 1e-6
    tune(model, X)
    assert model.first.plans(X, training=False)[0].name == "dense"
    json.dumps(result.to_dict())


def test_disturbed_measurements_are_marked() -> None:
    steady, noisy = Timing(1e-5, 0.9e-5, 2e-5, 9), Timing(3e-5, 1e-5, 5e-5, 9)
    case = "2x3x6x5/float32/contiguous/cpu/inference/t1/latency"
    entries = {
        "steady": {"dense": steady, "fused": steady, "staged": noisy},
        "choice": {"dense": steady, "fused": noisy},
        "dense": {"dense": noisy, "fused": steady},
    }
    layers = [LayerTuning(name, case, "fused", timings, {}) for name, timings in entries.items()]
    assert [entry.disturbed for entry in layers] == [False, True, True]
    lines = str(TuneResult(layers)).splitlines()
    ends = {
        line.split()[0]: line.split()[-1] for line in lines if line.split()[:1] and line.split()[0] in entries
    }
    assert ends == {"steady": "1.00×", "choice": "0.33×?", "dense": "3.00×?"}
    assert any(line.startswith("? disturbed (2 of 3): ") for line in lines)
    assert "disturbed" not in str(TuneResult(layers[:1]))


def test_printed_result_is_a_table(stopwatch: dict[str, float]) -> None:
    model = Net()
    result = tune(model, X)
    lines = str(result).splitlines()
    assert lines[0].split(":")[0].strip() == "milliseconds of a call" and "inference, cpu" in lines[0]
    header = next(line.split() for line in lines if "layer" in line)
    assert header == ["layer", "input", "plan", "dense", "packed", "staged", "fused", "over", "dense"]
    first = next(line.split() for line in lines if line.split()[:1] == ["first"])
    assert first[:5] == ["first", "2×3×6×5", "float32", "contiguous", "staged"]
    assert first[5:8] == ["0.020", "0.040", "0.010"] and first[-1] == "2.00×"
    assert lines[-1] == f"4 layers tuned in {result.seconds:.1f} s"
    assert repr(result) == f"<TuneResult: {lines[-1]}>"
    assert not any(line != line.rstrip() for line in lines)
    alone = FactorizedConv2d(3, 8, 3, rank=(2, 2)).double()
    result = tune(alone, X.double(), training=True)
    result.interrupted = True
    text = str(result)
    assert (
        "(model)" in text and "training, cpu" in text and "interrupted: the others are as they were" in text
    )
    assert text.count("fused: ") == 1
    result.layers.clear()
    assert str(result).startswith("0 layers tuned") and "\n" not in str(result)


def test_equal_layers_share_a_measurement(stopwatch: dict[str, float]) -> None:
    seen: list[tuple[int, int, str]] = []
    tune(Net(), X, progress=lambda *event: seen.append(event))
    assert seen == [(0, 3, "first"), (1, 3, "second"), (2, 3, "head"), (3, 3, "")]


def test_several_batches_and_kinds_of_arguments(stopwatch: dict[str, float]) -> None:
    model = Net()
    tune(model, [X, (X[:1],), {"x": torch.cat([X, X])}])
    batches = sorted(int(key.split("x")[0]) for key in model.first.tuned)
    assert batches == [1, 2, 4]


def test_training_is_tuned_apart(stopwatch: dict[str, float]) -> None:
    model = Net()
    tune(model, X, training=True)
    assert all("/training/" in key for key in model.first.tuned)
    assert model.first.plans(X, training=True)[0].measured == 1e-5
    assert model.first.plans(X, training=False)[0].measured is None
    assert all(p.grad is None for p in model.parameters())


def test_model_state_is_kept(stopwatch: dict[str, float]) -> None:
    model = Net().train()
    model.drop.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    tune(model, X)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_interrupt_keeps_what_is_done(stopwatch: dict[str, float]) -> None:
    model = Net()

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    result = tune(model, X, progress=interrupt)
    assert result.interrupted and [entry.layer for entry in result.layers] == ["first"]
    assert model.first.tuned and not model.second.tuned and not model.head.tuned


def test_a_layer_alone_and_real_measurement() -> None:
    layer = FactorizedConv2d(4, 6, 3, rank=(2, 2))
    for training in (False, True):
        result = tune(layer, torch.randn(1, 4, 8, 8), training=training, min_seconds=0.001)
        (entry,) = result.layers
        timings = entry.timings
        assert entry.layer == "" and {"dense", "staged"} <= set(timings)
        assert entry.choice in ("dense", min(timings, key=lambda name: timings[name].median))
        assert all(0 < t.p10 <= t.median <= t.p90 for t in timings.values())
        assert set(timings) | set(entry.unavailable) == {"dense", "packed", "staged", "fused", "partial"}


def test_models_without_factorized_layers() -> None:
    with pytest.raises(ValueError, match="no factorized layer"):
        tune(nn.Conv2d(3, 3, 3), X)
    unreached = nn.ModuleDict({"a": FactorizedLinear(4, 4, rank=2)})
    unreached.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="reach no factorized layer"):
        tune(unreached, X)


def test_choices_travel_as_json(stopwatch: dict[str, float]) -> None:
    model, other = Net(), Net()
    tune(model, [X, X[:1]])
    model.second.plan = "dense"
    model.head.prefer = "memory"
    taken = import_choices(other, json.loads(json.dumps(export_choices(model))))
    assert taken == 8
    assert other.first.tuned == model.first.tuned
    assert other.second.plan == "dense" and other.head.prefer == "memory" and other.first.plan is None


def test_choices_of_another_machine(stopwatch: dict[str, float]) -> None:
    model, other = Net(), Net()
    tune(model, X)
    model.second.plan = "staged"
    choices = export_choices(model)
    choices["machine"] = {"cpu": "abacus"}
    with pytest.warns(UserWarning, match=r"tuned on \['abacus'\]"):
        assert import_choices(other, choices) == 0
    assert other.first.tuned == {} and other.second.plan == "staged"
    assert import_choices(other, choices, any_machine=True) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.update(version=2),
        lambda c: c.update(layers=3),
        lambda c: c["layers"].update(fifth={"tuned": {}}),
        lambda c: c["layers"]["first"].update(plan="quick"),
        lambda c: c["layers"]["first"].update(prefer="speed"),
        lambda c: c["layers"]["head"].update(tuned={"1x2": {"plan": "dense"}}),
        lambda c: next(iter(c["layers"]["head"]["tuned"].values())).update(plan="partial"),
        lambda c: next(iter(c["layers"]["head"]["tuned"].values())).update(seconds={"dense": float("nan")}),
    ],
)
def test_damaged_choices_change_nothing(damage: Any, stopwatch: dict[str, float]) -> None:
    model, other = Net(), Net()
    tune(model, X)
    choices = export_choices(model)
    damage(choices)
    with pytest.raises(ValueError, match=r"import_choices|plan key"):
        import_choices(other, choices)
    assert all(not layer.tuned for layer in (other.first, other.second, other.head))


def test_interleaving() -> None:
    order: list[str] = []
    timings = tuner.time_interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1e-4)
    assert set(timings) == {"a", "b"} and timings["a"].rounds >= 5
    switches = sum(x != y for x, y in pairwise(order))
    assert switches >= 2 * timings["a"].rounds - 1


def test_traced_plan_follows_tuning(stopwatch: dict[str, float]) -> None:
    layer = FactorizedConv2d(3, 8, 3, padding=1, rank=(2, 2))
    tune(layer, X)
    assert layer._traced_plans[0] == "staged"
    stopwatch["dense"] = 1e-6
    tune(layer, X)
    assert layer._traced_plans[0] == "dense"
    layer.plan = "staged"
    assert layer._traced_plans == ("staged", "staged")
    assert get_plan("staged").name == "staged"


def test_dense_wins_what_noise_could_decide(stopwatch: dict[str, float]) -> None:
    for share, name in ((1.015, "dense"), (1.03, "staged")):
        model = Net()
        stopwatch["dense"] = share * stopwatch["staged"]
        assert {entry.choice for entry in tune(model, X).layers} == {name}
        reason = model.first.plans(X, training=False)[0].reason
        assert reason == ("measured fastest" if name == "staged" else "measured about as fast as the fastest")


@pytest.mark.parametrize("training", [False, True])
def test_expanded_inputs(stopwatch: dict[str, float], training: bool) -> None:
    layer = FactorizedConv2d(3, 8, 3, rank=(4, 3))
    x = torch.randn(1, 1, 6, 5).expand(4, 3, 6, 5)
    (entry,) = tune(layer, x, training=training).layers
    assert entry.case == str(layer.case(x, training))


def test_layers_called_by_keyword(stopwatch: dict[str, float]) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = FactorizedLinear(6, 5, rank=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(input=x)
            return y

    assert [entry.layer for entry in tune(Keyword(), torch.randn(3, 6)).layers] == ["layer"]


def test_tune_names_what_it_was_given() -> None:
    class Result:
        model = nn.Linear(2, 2)

    with pytest.raises(
        TypeError, match=r"tune: model must be a torch.nn.Module, got Result \(pass its .model\)"
    ):
        tune(Result(), torch.zeros(1))  # type: ignore[arg-type]
    layer = FactorizedLinear(4, 4, format="svd", rank=2)
    with pytest.raises(TypeError, match=r"example_inputs must be a tensor, .*, got str"):
        tune(layer, "hi")


def test_disturbed_times_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = {"dense": Timing(9.0, 1.0, 9.5, 5), "staged": Timing(2.0, 1.9, 2.1, 5)}
    quiet = {"dense": Timing(1.1, 1.0, 1.2, 5), "staged": Timing(2.2, 1.9, 2.3, 5)}
    runs = iter([disturbed, quiet])
    monkeypatch.setattr(tuner, "time_interleaved", lambda *_: next(runs))
    found = tuner._steady_times({}, 0.1, math.inf, torch.device("cpu"))
    assert found == {"dense": quiet["dense"], "staged": disturbed["staged"]}
    runs = iter([quiet])
    assert tuner._steady_times({}, 0.1, math.inf, torch.device("cpu")) == quiet


def test_the_budget_is_shared_by_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of every kind of layer counts, so that formats of more plans take no more time in all."""
    asked: list[tuple[int, float]] = []

    def timed(calls: dict[str, Any], seconds: float, *how: Any) -> dict[str, Timing]:
        asked.append((len(calls), seconds))
        return {name: Timing(1e-3, 1e-3, 1e-3, 5) for name in calls}

    monkeypatch.setattr(tuner, "time_interleaved", timed)
    monkeypatch.setattr(tuner, "_BUDGET", 0.5)
    model = nn.Sequential(
        FactorizedConv2d(3, 8, 3, rank=(4, 3)), nn.Flatten(), FactorizedLinear(8, 5, rank=3)
    )
    x = torch.randn(2, 3, 3, 3)
    tune(model, x, min_seconds=10.0)
    assert len(asked) == 2 and min(count for count, _ in asked) >= 2
    assert sum(count * seconds for count, seconds in asked) == pytest.approx(0.5)
    asked.clear()
    tune(model, x, min_seconds=0.001)
    assert {seconds for _, seconds in asked} == {0.001}


def test_no_time_is_taken_again_past_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    disturbed = Timing(9.0, 1.0, 9.5, 5)

    def timed(calls: dict[str, Any], seconds: float, *how: Any) -> dict[str, Timing]:
        asked.append(seconds)
        return dict.fromkeys(calls, disturbed)

    monkeypatch.setattr(tuner, "time_interleaved", timed)
    calls: dict[str, Any] = {"dense": None, "staged": None}
    now = time.perf_counter()
    assert tuner._steady_times(calls, 0.1, now - 1.0, "cpu") == dict.fromkeys(calls, disturbed)
    assert asked == [0.1]
    tuner._steady_times(calls, 50.0, now + 60.0, "cpu")
    assert asked[1] == 50.0 and 20.0 < asked[2] <= 30.0


def test_modes_are_measured_apart(stopwatch: dict[str, float]) -> None:
    """Layers of one rank and size whose factors differ."""
    seen: list[str] = []
    model = nn.Sequential(
        FactorizedLinear(64, 64, format="tt", rank=4, in_modes=(8, 8), out_modes=(8, 8)),
        FactorizedLinear(64, 64, format="tt", rank=4, in_modes=(2, 32), out_modes=(32, 2)),
        FactorizedLinear(64, 64, format="tt", rank=4, in_modes=(8, 8), out_modes=(8, 8)),
    )
    stopwatch |= {"merged": 5e-5, "pair": 6e-5}
    tune(model, torch.randn(3, 64), progress=lambda done, total, name: seen.append(name))
    assert seen == ["0", "1", ""]
