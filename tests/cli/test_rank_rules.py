"""Rules for whole networks on the command line."""

import importlib
import json

import pytest
from typer.testing import CliRunner

from tensorcomp_ext.cli.main import app
from tensorcomp_ext.compress import Latency

BASE = (
    "compress",
    "--model",
    "lenet5",
    "--dataset",
    "digits",
    "--batch",
    "4",
    "--seconds",
    "0",
    "--no-tune",
    "--json",
)


class Counted:
    """A clock for which a layer takes as long as it has weights."""

    def seconds(self, model):
        return 1e-9 * sum(p.numel() for p in model.parameters())

    def layers(self, dense, call, made, seconds):
        return [self.seconds(layer) for layer in (dense, *made)]

    def networks(self, models, example_inputs, seconds):
        return {name: Latency(*[self.seconds(model)] * 3) for name, model in models.items()}


def run(*words, code=0):
    outcome = CliRunner().invoke(app, [str(word) for word in words])
    assert outcome.exit_code == code, (outcome.output, outcome.exception)
    return outcome


@pytest.mark.filterwarnings("ignore")
def test_latency_chooses_ranks_and_the_report_has_what_was_measured(monkeypatch):
    rule = importlib.import_module("tensorcomp_ext.compress.latency_rule")
    monkeypatch.setattr(rule, "WallClock", Counted)
    found = json.loads(run(*BASE, "--rank", "latency:3").stdout)
    details = found["latency_rule"]
    assert details["asked"] == 3.0
    assert details["batch"] == 4
    assert details["measured"] >= 3.0 * 0.95
    assert not details["calibrated"]
    assert found["report"]["model_ratio"] == pytest.approx(details["measured"], rel=0.01)


@pytest.mark.filterwarnings("ignore")
def test_a_budget_of_the_network():
    found = json.loads(run(*BASE, "--rank", "network-params:0.25").stdout)
    assert 3.9 < found["report"]["parameters_before"] / found["report"]["parameters_after"] < 4.2


def test_a_speedup_below_one_is_refused():
    outcome = run(*BASE, "--rank", "latency:0.5", code=2)
    assert "speedup must be at least 1" in " ".join(outcome.output.split())
