"""Ranks by latency, with a table in place of the clock: against every combination of ranks there is."""

import importlib
import itertools
import json
import warnings

import pytest
import torch
from compress_networks import same_state, small_net, state
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext.compress import Latency
from tensorcomp_ext.compress.calls import trace
from tensorcomp_ext.compress.latency_rule import replay
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.compress.stopwatch import WallClock
from tensorcomp_ext.nn import FactorizedLayer

latency_rule = importlib.import_module("tensorcomp_ext.compress.latency_rule")  # tc.compress is a function
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
REST = 0.5e-6
"""What no rank changes."""


class FakeClock:
    """A layer takes what its weights count, a candidate a bit more; of what is saved a part shows."""

    def __init__(self, shown=1.0, floor=0.0):
        self.shown, self.floor, self.measured = shown, floor, 0

    def dense(self, layer):
        return layer.weight[0].numel() * layer.weight.shape[0] * 1e-9

    def candidate(self, layer):
        rank = layer.rank if isinstance(layer.rank, tuple) else (layer.rank,)
        stored = sum(p.numel() for p in layer.weight.parameters())
        return max(self.floor, (stored + 50 + 100 * (rank[0] % 4 != 0)) * 1e-9)

    def layers(self, dense, call, made, seconds):
        self.measured += 1
        return [self.dense(dense), *map(self.candidate, made)]

    def total(self, model, reference):
        """Of the dense network what it takes, of another one the part of the saving that shows."""
        plain = sum(self.dense(m) for m in reference.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        now = sum(
            self.candidate(m) if isinstance(m, FactorizedLayer) else self.dense(m)
            for m in model.modules()
            if isinstance(m, (nn.Conv2d, nn.Linear, FactorizedLayer))
        )
        return REST + plain - self.shown * (plain - now)

    def networks(self, models, example_inputs, seconds):
        found = {name: self.total(model, models["dense"]) for name, model in models.items()}
        # Medians count: quick calls of one network alone must not look like a speed-up.
        quick = {"dense": 1.0, "compressed": 0.5}
        return {name: Latency(quick[name] * taken, taken, 2 * taken) for name, taken in found.items()}


class Coarse(FakeClock):
    """Whatever its rank, a candidate takes nothing."""

    def candidate(self, layer):
        return 0.0


def run(monkeypatch, model, clock, speedup=1.5, x=X, **options):
    monkeypatch.setattr(latency_rule, "WallClock", lambda: clock)
    rule = tc.ranks.Latency(speedup, **options)
    return tc.compress(model, rank=rule, example_inputs=x)


@pytest.mark.parametrize("speedup", [1.1, 1.4, 2.0, 2.6])
def test_the_choice_is_the_best_of_all_combinations(speedup, monkeypatch):
    model, clock = small_net(), FakeClock()
    result = run(monkeypatch, model, clock, speedup)
    details = result.report.details["latency_rule"]
    names, options = [], []
    for table in details["tables"]:
        for name, losses in table["layers"].items():
            names.append(name)
            saved = [table["dense_seconds"] - seconds for seconds in table["seconds"]]
            ranks = [None, *map(tuple, table["ranks"])]
            options.append(list(zip([0.0, *saved], [0.0, *losses], ranks, strict=True)))
    whole = clock.total(model, model)
    enough = whole * (1 - 1 / speedup)
    fitting = [
        combination
        for combination in itertools.product(*options)
        if sum(saved for saved, _, _ in combination) >= enough - 1e-15
    ]
    best = min(fitting, key=lambda combination: sum(loss for _, loss, _ in combination))
    expected = {name: rank for name, (_, _, rank) in zip(names, best, strict=True)}
    assert {name: result.report[name].rank for name in names} == expected
    assert details["loss"] == pytest.approx(sum(loss for _, loss, _ in best))
    assert details["measured"] == pytest.approx(clock.total(model, model) / clock.total(result.model, model))
    assert details["measured"] >= speedup - 1e-9
    assert replay(json.loads(json.dumps(details))) == expected


def test_the_losses_are_those_of_the_layers_made(monkeypatch):
    model = small_net()
    result = run(monkeypatch, model, FakeClock(), 1.8)
    tables = result.report.details["latency_rule"]["tables"]
    assert result.report.replaced
    for entry in result.report.replaced:
        table = next(table for table in tables if entry.name in table["layers"])
        loss = table["layers"][entry.name][table["ranks"].index(list(entry.rank))]
        assert entry.relative_error <= loss**0.5 + 1e-6  # iterated from what the loss is of
        assert entry.relative_error >= 0.9 * loss**0.5


def test_what_shows_in_the_network_corrects_the_prediction(monkeypatch):
    model, clock = small_net(), FakeClock(shown=0.75)
    details = run(monkeypatch, model, clock, 1.6, tolerance=0.02).report.details["latency_rule"]
    first, last = details["rounds"][0], details["rounds"][-1]
    assert len(details["rounds"]) > 1
    assert first["measured"] < 1.6 * 0.98 <= last["measured"]
    assert details["measured"] == last["measured"] == pytest.approx(last["predicted"])
    assert details["reached"] is True


def test_more_than_asked_is_given_back(monkeypatch):
    """Where more shows than the tables said, ranks grow again."""
    details = run(monkeypatch, small_net(), FakeClock(shown=1.4), 1.6, tolerance=0.02).report.details
    rounds = details["latency_rule"]["rounds"]
    assert rounds[0]["measured"] > 1.6 * 1.02
    assert rounds[-1]["loss"] < rounds[0]["loss"]
    assert rounds[-1]["measured"] >= 1.6 * 0.98


def test_what_looks_near_by_chance_is_looked_at_again(monkeypatch):
    """The first choice falls short by far, but its first measurement says that it is what was asked for."""

    class Lucky(FakeClock):
        once = True

        def networks(self, models, example_inputs, seconds):
            found = super().networks(models, example_inputs, seconds)
            if "compressed" in found and self.once:
                self.once = False
                found["compressed"] = Latency(*[found["dense"].p50 / 1.6] * 3)
            return found

    details = run(monkeypatch, small_net(), Lucky(shown=0.75), 1.6).report.details["latency_rule"]
    assert details["rounds"][0]["measured"] < 1.6 * 0.9
    assert 1.6 * 0.95 <= details["measured"] <= 1.6 * 1.05


def test_much_more_than_asked_is_said(monkeypatch):
    """The only rank there is saves nearly all of the network's time."""
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    with pytest.warns(UserWarning, match=r"latency:1.02: .* measured 9\.\d\dx as fast, more than was asked"):
        details = run(monkeypatch, model, Coarse(), 1.02, torch.randn(4, 64)).report.details
    assert details["latency_rule"]["measured"] > 1.1 * 1.02


def test_an_unreachable_speedup_is_said(monkeypatch):
    clock = FakeClock(floor=1e-6)
    with pytest.warns(
        UserWarning, match=r"latency:8.0 was not reached: .* measured 2\.\d\dx as fast; the layers"
    ):
        report = run(monkeypatch, small_net(), clock, 8.0).report
    details = report.details["latency_rule"]
    assert details["reached"] is False
    assert 2.0 < details["measured"] < 3.0
    assert details["measured"] == max(entry["measured"] for entry in details["rounds"])


def test_layers_of_one_kind_are_measured_once(monkeypatch):
    torch.manual_seed(0)
    block = [layer for _ in range(4) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *block).eval()
    clock = FakeClock()
    report = run(monkeypatch, model, clock, 1.3).report
    tables = report.details["latency_rule"]["tables"]
    assert sorted(len(table["layers"]) for table in tables) == [1, 4]
    assert clock.measured == 4  # of each kind the dense layer, to know what can be afforded, then all
    large = max(tables, key=lambda table: len(table["layers"]))
    assert len({tuple(losses) for losses in large["layers"].values()}) == 4  # errors are each layer's own


def test_calibration_weighs_by_what_is_read(monkeypatch):
    """Half of the input channels carry nothing: the ranks spent on them are spared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3)).eval()
    x = torch.randn(8, 16, 10, 10)
    x[:, 8:] *= 1e-3
    plain = run(monkeypatch, model, FakeClock(), 1.8, x)
    aware = run(monkeypatch, model, FakeClock(), 1.8, x, calibration=[x[:4], x[4:]])
    assert aware.report.output_error < 0.9 * plain.report.output_error
    details = aware.report.details["latency_rule"]
    assert details["calibrated"] and not plain.report.details["latency_rule"]["calibrated"]
    # The loss of the first layer is the error of its outputs on the calibration images.
    first, entry = aware.model[0], aware.report["0"]
    table = next(table for table in details["tables"] if "0" in table["layers"])
    loss = table["layers"]["0"][table["ranks"].index(list(entry.rank))]
    bias = model[0].bias[None, :, None, None]
    with torch.no_grad():
        exact = model[0](x) - bias
        found = float((first(x) - bias - exact).norm() / exact.norm())
    assert loss**0.5 == pytest.approx(found, rel=1e-3)


def test_calibration_of_linear_layers_and_dicts(monkeypatch):
    torch.manual_seed(0)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 32)

        def forward(self, *, tokens):
            return self.second(self.first(tokens).relu())

    rows = torch.randn(6, 9, 48) @ torch.randn(48, 48)
    inputs = {"tokens": rows}
    result = run(monkeypatch, Named().eval(), FakeClock(), 1.3, inputs, calibration=inputs)
    assert result.report.details["latency_rule"]["batch"] == 6
    assert result.report.replaced


@pytest.mark.parametrize("inplace", [False, True])
def test_model_and_report(inplace, monkeypatch, tmp_path):
    model = small_net()
    model.stem.note = "kept"
    before, random_state = state(model), torch.random.get_rng_state()
    monkeypatch.setattr(latency_rule, "WallClock", FakeClock)
    result = tc.compress(model, rank="latency:1.5", example_inputs=X, inplace=inplace)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert (result.model is model) is inplace
    if not inplace:
        assert same_state(state(model), before)
    assert result.model.stem.note == "kept"
    assert result.model.head.bias is not None
    again = Report.from_dict(json.loads(result.report.to_json()))
    assert again.details["latency_rule"] == json.loads(json.dumps(result.report.details["latency_rule"]))
    tc.save(result.model, tmp_path / "small.tc", report=result.report)
    loaded = tc.load(tmp_path / "small.tc", small_net())
    with torch.no_grad():
        assert torch.equal(loaded(X), result.model(X))


def test_the_same_measurements_give_the_same_ranks(monkeypatch):
    first, second = (run(monkeypatch, small_net(), FakeClock(), 1.7).report for _ in range(2))
    assert [entry.rank for entry in first] == [entry.rank for entry in second]


def test_a_speedup_of_one_leaves_the_network_alone(monkeypatch):
    with pytest.warns(UserWarning, match="nothing was replaced"):
        report = run(monkeypatch, small_net(), FakeClock(), 1.0).report
    assert not report.replaced
    assert "dense is the better use of the time" in report["stem"].skipped


def test_other_formats_stay_dense(monkeypatch):
    monkeypatch.setattr(latency_rule, "WallClock", FakeClock)
    model = small_net()
    report = tc.compress(model, rank=tc.ranks.Latency(1.2), format={"stem": "cp"}, example_inputs=X).report
    assert "ranks svd and tucker2 only" in report["stem"].skipped
    with pytest.raises(ValueError, match="ranks the formats svd and tucker2, got cp"):
        tc.compress(model, rank=tc.ranks.Latency(1.2), format="cp", example_inputs=X, exclude="head")


def test_bad_calls(monkeypatch):
    model = small_net()
    with pytest.raises(ValueError, match=r"rank=latency:2.0 needs example_inputs"):
        tc.compress(model, rank=tc.ranks.Latency())
    with pytest.raises(ValueError, match=r"speedup must be at least 1 and finite, got 0.5"):
        tc.ranks.Latency(0.5)
    with pytest.raises(
        ValueError, match=r"is left no layer to choose ranks for .*not among the layers asked for"
    ):
        tc.compress(model, rank=tc.ranks.Latency(), example_inputs=X, layers="head", exclude="head")
    with pytest.raises(ValueError, match="calibration must hold at least one batch"):
        run(monkeypatch, model, FakeClock(), calibration=[])
    with pytest.raises(ValueError, match="calibration: layer 'stem' reads NaN or Inf"):
        run(monkeypatch, model, FakeClock(), calibration=torch.full_like(X, float("nan")))


def test_the_real_clock_measures_and_tunes():
    """On this machine, for a moment: what is measured is in the report, and plans go with the layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
    x = torch.randn(2, 16, 16, 16)
    done = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # whatever speed-up is reached here
        result = tc.compress(
            model,
            rank=tc.ranks.Latency(1.2, seconds=1.0, rounds=2),
            example_inputs=x,
            progress=lambda *arguments: done.append(arguments),
        )
    details = result.report.details["latency_rule"]
    assert details["batch"] == 2
    assert details["measured"] > 0
    for table in details["tables"]:
        assert all(0 < seconds < 1 for seconds in (table["dense_seconds"], *table["seconds"]))
        assert all(len(plans) == 1 for plans in table["plans"])
    assert all(result.model.get_submodule(entry.name).tuned for entry in result.report.replaced)
    assert any("latency of" in name for _, _, name in done)


def test_the_clock_of_layers_counts_the_dense_one_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3)).eval()
    _, calls = trace(model, {"0": model[0]}, torch.randn(4, 8, 20, 20))
    small = tc.nn.FactorizedConv2d.from_conv(model[0], rank=(4, 2))
    times = WallClock().layers(model[0], calls["0"][0], [small], 0.05)
    assert len(times) == 2
    assert small.tuned


def test_a_busy_machine_is_said(monkeypatch):
    """From one look to the next the dense network takes longer and longer."""

    class Busy(FakeClock):
        looks = 0

        def networks(self, models, example_inputs, seconds):
            self.looks += 1
            found = super().networks(models, example_inputs, seconds)
            return {
                name: Latency(*(taken * 1.2**self.looks for taken in time)) for name, time in found.items()
            }

    with pytest.warns(UserWarning, match=r"was not reached: .* times as long at one time as at another"):
        run(monkeypatch, small_net(), Busy(floor=1e-6), 8.0)
