"""Every recipe from the command line, from a dense network to a saved one, on few images."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tensorcomp_ext import models
from tensorcomp_ext.cli.main import app
from tensorcomp_ext.compress import load
from tensorcomp_ext.data import Dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*clipped to", "ignore:.*rank 1 already needs")

RUNS = {
    "vbmf": ["--exact-threshold", "--layers", "conv2"],
    "energy": ["--p", "0.5", "--no-refresh"],
    "latency": ["--speedup", "1.05", "--measure-batch", "4", "--calibration", "8", "--measure-seconds", "1"],
    "l0": ["--rank", "4", "--preset", "lenet5-tr", "--gate-lr", "20", "--lr", "0.01"],
    "reinforce": ["--rank", "3", "--format", "tt", "--samples", "2"],
    "mars": ["--rank", "3", "--format", "tr", "--strength", "hard"],
    "uniform": ["--rank", "2", "--layers", "fc1"],
    "nrmf": ["--alpha", "0.05", "--finetune-share", "0.5"],
    "progressive": ["--target", "0.2", "--decay", "linear"],
}


POSTTRAINING = ("vbmf", "energy", "latency")


def run(*words, code=0):
    outcome = CliRunner().invoke(app, ["compress", *map(str, words)])
    assert outcome.exit_code == code, (outcome.output, outcome.exception)
    assert "Traceback" not in outcome.output
    return outcome


@pytest.fixture(autouse=True)
def images(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (48, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(48) % 10
    classes = tuple("0123456789")
    found = Dataset("digits", pictures, labels, pictures, labels, (0.5,), (0.5,), classes)
    monkeypatch.setattr("tensorcomp_ext.data.load", lambda *args, **options: found)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "lenet5.th"
    torch.save(models.build("lenet5").state_dict(), path)
    return path


def words_for(name, weights, epochs=2):
    common = ["--model", "lenet5", "--weights", weights, "--dataset", "digits", "--recipe", name]
    common += ["--no-tune", "--batch", "1", "--seconds", "0", "--train-batch", "16"]
    return [*common, "--epochs", epochs] if epochs else common


@pytest.mark.parametrize("name", RUNS)
def test_runs_saves_and_logs(name, weights, tmp_path):
    path, logs = tmp_path / "net", tmp_path / "logs"
    words = [*words_for(name, weights), *RUNS[name], "--json", "--output", path, "--logs", logs]
    found = json.loads(run(*words).stdout)
    # Those of gates draw factors by default: what comes out of them was not fine-tuned.
    learned = "trained" if name in ("l0", "reinforce", "mars", "uniform") else "finetuned"
    assert set(found["accuracy"]) == {"before", learned}
    assert ("posttraining" if name in POSTTRAINING else name) in found
    layers = found["report"]["layers"]
    assert [layer["name"] for layer in layers] == ["conv1", "conv2", "fc1", "fc2"]
    replaced = [layer for layer in layers if layer["skipped"] is None]
    assert replaced or name == "latency"  # what so small a network gains is not to be told in a second
    if name == "latency":
        assert {layer["format"] for layer in replaced} <= {"tucker2", "svd"}
        assert all(layer["skipped"] or layer["rank"] for layer in layers)
    if name == "uniform":
        assert [layer["name"] for layer in replaced] == ["fc1"]
    network = load(path, models.build("lenet5"))
    assert sum(p.numel() for p in network.parameters()) == found["report"]["parameters_after"]
    lines = (logs if name != "nrmf" else logs / "regularised").joinpath("history.jsonl").read_text()
    assert len(lines.splitlines()) == (2 if name != "nrmf" else 1)


@pytest.mark.parametrize("name", ["l0", "progressive"])
def test_resumes(name, weights, tmp_path):
    words = [*words_for(name, weights), *RUNS[name], "--resume", tmp_path / "run"]
    run(*words, "--output", tmp_path / "first")
    written = (tmp_path / "run").stat().st_mtime_ns
    run(*words, "--output", tmp_path / "second")
    assert (tmp_path / "run").stat().st_mtime_ns == written  # nothing was left to train
    first, second = (
        load(tmp_path / place, models.build("lenet5")).state_dict() for place in ("first", "second")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("l0", ["--format", "lowrank_sparse"], "is about ranks between factors, which 'lowrank_sparse' does"),
        ("l0", ["--preset", "lenet"], "'lenet' is none of lenet5-tr"),
        ("l0", ["--preset", "mlp-ttm"], "linear layers must be [[625, 784], [10, 625]]"),
        ("l0", ["--preset", "lenet5-tr", "--format", "tt"], "says formats and layers itself"),
        ("l0", ["--start", "dense"], "'dense' is none of"),
        ("l0", ["--sigma", "0"], "--recipe l0: sigma must be in (0, inf), got 0.0"),
        ("l0", ["--sigma", "inf"], "sigma must be in (0, inf), got inf"),
        ("l0", ["--target", "0.5"], "--recipe l0: target must be in (1, inf), got 0.5"),
        ("l0", ["--remove-below", "1.5"], "remove_below must be in [0, 1), got 1.5"),
        ("l0", ["--weight", "inf"], "weight must be in [0, inf), got inf"),
        ("reinforce", ["--target", "1"], "--recipe reinforce: target must be in (1, inf), got 1.0"),
        ("reinforce", ["--gate-lr", "inf"], "gate_lr must be in [0, inf), got inf"),
        ("reinforce", ["--weight", "inf"], "weight must be in [0, inf), got inf"),
        ("mars", ["--remove-below", "1"], "--recipe mars: remove_below must be in [0, 1), got 1.0"),
        ("mars", ["--logit", "nan"], "--recipe mars: logit must be in (-inf, inf), got nan"),
        ("mars", ["--logit", "x"], "--logit"),
        ("mars", ["--target", "3", "--remove-below", "0"], "remove_below must be above 0 for a target"),
        ("l0", ["--reduction", "max"], "'max' is none of mean, sum"),
        ("l0", ["--alpha", "0.1"], "this is for --recipe"),
        ("l0", ["--recalibrate"], "--recipe l0 has no use for it"),
        ("vbmf", ["--format", "cp"], "cannot choose ranks of 'cp': it reads the spectra of unfoldings"),
        ("energy", ["--format", "tr"], "decide the ranks of svd, tucker, tucker2, tt, ttm"),
        ("energy", ["--p", "1.5"], "must be above 0 and at most 1"),
        ("latency", ["--format", "tt"], "cannot choose ranks of 'tt'"),
        ("latency", ["--speedup", "1"], "must be above 1"),
        ("latency", ["--rank", "4"], "--recipe latency has no use for it"),
        ("mars", ["--prior", "1"], "--recipe mars: prior must be in (0, 1), got 1.0"),
        ("mars", ["--strength", "strong"], "'strong' is none of soft, hard"),
        ("reinforce", ["--samples", "0"], "--samples"),
        ("nrmf", ["--format", "tt"], "--recipe nrmf has no use for it"),
        ("nrmf", ["--rank", "4"], "--recipe nrmf has no use for it"),
        ("nrmf", ["--norm", "trace"], "'trace' is none of frobenius, nuclear"),
        ("nrmf", ["--p", "0"], "must be above 0 and at most 1"),
        ("progressive", ["--format", "cp"], "--recipe progressive has no use for it"),
        ("progressive", ["--init", "zero"], "'zero' is none of residual, lora"),
        ("progressive", ["--decay", "step"], "'step' is none of cosine, linear, sine"),
        ("progressive", ["--target", "0"], "--recipe progressive: target must be in (0, 1), got 0.0"),
        ("progressive", ["--target", "1"], "target must be in (0, 1), got 1.0"),
        ("progressive", ["--share", "0"], "share must be in (0, 1], got 0.0"),
        ("progressive", ["--start", "inf"], "start must be in [1, inf), got inf"),
    ],
)
def test_pairs_that_make_no_sense(name, more, message, weights):
    outcome = run(*words_for(name, weights), *more, code=2)
    assert message in " ".join(outcome.stderr.split())


@pytest.mark.parametrize("name", [name for name in RUNS if name not in POSTTRAINING])
def test_training_recipes_need_epochs(name, weights):
    outcome = run(*words_for(name, weights, epochs=0), code=2)
    assert "this recipe trains: say for how long with --epochs" in " ".join(outcome.stderr.split())
