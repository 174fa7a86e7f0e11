from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tensorcomp_ext import models
from tensorcomp_ext.cli.main import app
from tensorcomp_ext.cli.plots import available
from tensorcomp_ext.cli.summary import summary_table
from tensorcomp_ext.compress import CheckpointError, compress, load, read_header, save
from tensorcomp_ext.compress.latency import Latency
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.recipes import Accuracy

pytestmark = pytest.mark.filterwarnings("ignore:.*clipped to")

FAST = ["--batch", "1", "--seconds", "0"]
RECIPE = [
    "compress",
    "--model",
    "lenet5",
    "--dataset",
    "digits",
    "--recipe",
    "sparse",
    "--finetune-epochs",
    "1",
]


def run(*words: object, code: int = 0):
    outcome = CliRunner().invoke(app, [str(word) for word in words])
    assert outcome.exit_code == code, (outcome.output, outcome.exception)
    assert "Traceback" not in outcome.output
    return outcome


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A LeNet-5 in a torch file, with the prefix DataParallel leaves."""
    torch.manual_seed(0)
    network = models.build("lenet5")
    path = tmp_path_factory.mktemp("weights") / "lenet5.th"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "lenet5.safetensors"
    words = ["--model", "lenet5", "--weights", weights, "--rank", 4, "--output", path, "--no-tune"]
    run("compress", *words, *FAST)
    return path


def digits(classes: int = 10) -> Dataset:
    generator = torch.Generator().manual_seed(0)  # a run resumes on the same images only
    images = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(40) % classes
    return Dataset("digits", images, labels, images, labels, (0.5,), (0.5,), tuple("0123456789"))


@pytest.mark.parametrize("command", ["demo", "compress", "bench", "tune", "report", "info"])
def test_every_command_has_help(command):
    outcome = run(command, "--help")
    assert "Usage: " in outcome.stdout and "--json" in outcome.stdout


def test_module_is_the_command():
    command = [sys.executable, "-m", "tensorcomp_ext", "info", "--json"]
    root = Path(__file__).parents[2]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    found = json.loads(outcome.stdout)
    assert found["torch"] == torch.__version__ and set(found["native"]) == {"ok", "reason"}
    assert {"version", "isa", "threads", "cache", "cuda"} <= found.keys()


def test_info_for_people():
    assert str(torch.__version__) in run("info").stdout


def test_compress_saves_a_network_that_loads(checkpoint, weights):
    header = read_header(checkpoint)
    assert header.meta["model"]["name"] == "lenet5" and header.report is not None
    network = load(checkpoint, models.build("lenet5"))
    dense = models.build("lenet5")
    models.load_weights(dense, weights)
    expected = compress(dense, rank=4).model
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == {
        k: tuple(v.shape) for k, v in expected.state_dict().items()
    }


def test_compress_as_json_with_accuracy(monkeypatch, weights, tmp_path):
    images = digits()
    monkeypatch.setattr("tensorcomp_ext.data.load", lambda *args, **options: images)
    network = ["--model", "lenet5", "--weights", weights, "--dataset", "digits"]
    ranks = ["--rank", "conv*=energy:0.9", "--rank", "0.5"]
    files = ["--html", tmp_path / "r.html"]
    outcome = run("compress", *network, *ranks, *files, "--finetune-epochs", 1, "--json", *FAST)
    found = json.loads(outcome.stdout)  # nothing else on stdout
    assert "test images correct" in outcome.stderr and "r.html" in outcome.stderr
    assert "fine-tuning: epoch 1 of 1, loss" in outcome.stderr
    assert set(found["accuracy"]) == {"before", "decomposed", "finetuned"}
    assert all(counted["total"] == 40 for counted in found["accuracy"].values())
    assert set(found["latency"]) == {"1"} and set(found["latency"]["1"]) == {"dense", "compressed"}
    report = found["report"]
    assert report["parameters_after"] < report["parameters_before"]
    assert all(layer["latency_after"] for layer in report["layers"] if layer["skipped"] is None)
    assert "<html" in (tmp_path / "r.html").read_text().lower()


def test_training_images_are_needed_for_training_only(monkeypatch, weights):
    asked, images = [], digits()
    monkeypatch.setattr("tensorcomp_ext.data.load", lambda *a, **options: asked.append(options) or images)
    words = ["--model", "lenet5", "--weights", weights, "--dataset", "digits", "--rank", "4", "--no-tune"]
    for more in ([], ["--finetune-epochs", 1], ["--recalibrate"]):
        run("compress", *words, *more, *FAST)
    assert [options["train"] for options in asked] == [False, True, True]


def test_recalibration_is_scored_and_saved(monkeypatch, tmp_path):
    images = digits().padded(32)
    monkeypatch.setattr("tensorcomp_ext.data.load", lambda *args, **options: images)
    words = ["--model", "resnet20", "--dataset", "digits", "--rank", "4", "--no-tune", "--json", *FAST]
    states, stages = [], []
    for more in ([], ["--recalibrate"]):
        torch.manual_seed(0)
        path = tmp_path / f"net{len(more)}"
        outcome = run("compress", *words, "--output", path, *more)
        stages.append([*json.loads(outcome.stdout)["accuracy"]])
        assert ("recalibrated:" in outcome.stderr) == bool(more)
        states.append(load(path, models.build("resnet20", in_channels=1)).state_dict())
    assert stages == [["before", "decomposed"], ["before", "decomposed", "recalibrated"]]
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert changed and all(name.rpartition(".")[2].startswith(("running_", "num_")) for name in changed)
    found = summary_table({"accuracy": json.loads(outcome.stdout)["accuracy"]})
    assert [*found.columns[0].cells] == ["correct, decomposed", "correct, recalibrated"]


def test_recalibration_without_batch_normalisation_says_so(monkeypatch, weights):
    monkeypatch.setattr("tensorcomp_ext.data.load", lambda *args, **options: digits())
    words = ["--model", "lenet5", "--weights", weights, "--dataset", "digits", "--rank", "4", "--no-tune"]
    outcome = run("compress", *words, "--recalibrate", *FAST)
    assert "warning: --recalibrate: the network has no batch normalisation" in outcome.stderr


def test_training_goes_on_where_it_was(monkeypatch, weights, tmp_path):
    monkeypatch.setattr("tensorcomp_ext.data.load", lambda *args, **options: digits())
    words = ["--model", "lenet5", "--weights", weights, "--dataset", "digits", "--recipe", "lowrank-sparse"]
    words += ["--finetune-epochs", 2, "--prune-epochs", 1, "--alpha", 0.5, "--temperature", 2]
    words += ["--no-tune", "--resume", tmp_path / "run"]
    run("compress", *words, "--output", tmp_path / "first", *FAST)
    written = (tmp_path / "run").stat().st_mtime_ns
    run("compress", *words, "--output", tmp_path / "second", *FAST)
    assert (tmp_path / "run").stat().st_mtime_ns == written  # nothing was left to train
    first, second = (
        load(tmp_path / name, models.build("lenet5")).state_dict() for name in ("first", "second")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    outcome = run("compress", *words, "--mode", "masking", *FAST, code=1)
    assert "other settings" in outcome.stderr and "now 'masking')" in outcome.stderr


def test_formats_of_each_kind_of_layer(monkeypatch, weights, tmp_path):
    monkeypatch.setattr("tensorcomp_ext.data.load", lambda *args, **options: digits())
    words = ["--model", "lenet5", "--weights", weights, "--dataset", "digits", "--recipe", "lowrank-sparse"]
    words += ["--low-rank", "conv=tucker2", "--low-rank", "linear=svd", "--output", tmp_path / "net"]
    run("compress", *words, "--finetune-epochs", 1, *FAST)
    network = load(tmp_path / "net", models.build("lenet5"))
    found = [network.get_submodule(name).weight.structure["low_rank"] for name in ("conv2", "fc1")]
    assert found == ["tucker2", "svd"]


@pytest.mark.parametrize("recipe", ["lowrank-sparse", "sparse", "lowrank"])
def test_recipes(monkeypatch, weights, recipe, tmp_path):
    monkeypatch.setattr("tensorcomp_ext.data.load", lambda *args, **options: digits())
    files = ["--output", tmp_path / "net", "--html", tmp_path / "report.html"]
    words = ["--model", "lenet5", "--weights", weights, "--dataset", "digits", "--recipe", recipe]
    words += ["--finetune-epochs", 2, "--storage", 0.2, "--mode", "masking", "--low-rank", "tt", "--json"]
    if recipe == "lowrank-sparse":
        words += ["--criterion", "difference", "--direction", "student-teacher", "--optimizer", "adam"]
    outcome = run("compress", *words, *files, *FAST)
    found = json.loads(outcome.stdout)
    stored = found["lowrank_sparse"]
    assert set(found["accuracy"]) == {"before", "finetuned"}
    assert stored["method"] == recipe and stored["stored"] <= 0.2 * stored["weights"] + 1
    assert (stored["low_rank"] > 0) == (recipe != "sparse") and (stored["sparse"] > 0) == (
        recipe != "lowrank"
    )
    layers = {layer["name"]: layer for layer in found["report"]["layers"]}
    assert layers["fc2"]["skipped"] == "excluded" and layers["fc1"]["skipped"] is None
    network = load(tmp_path / "net", models.build("lenet5"))
    kept = sum(p.numel() for p in network.parameters())
    assert kept == found["report"]["parameters_after"] == stored["stored"] + 3200 + 400
    page = (tmp_path / "report.html").read_text()
    assert "outputs after training" in page
    assert ("bytes with them" in page) == (recipe != "lowrank")
    assert ("which value, before (grey) and after (blue)" in page) == available()
    cells = [str(c) for c in summary_table(found).columns[0].cells]
    assert ("their bytes with indices" in cells) == (recipe != "lowrank")


@pytest.mark.parametrize(("after", "warns"), [(35, True), (36, False)])
def test_compress_warns_where_accuracy_is_lost(monkeypatch, weights, after, warns):
    images, scores = digits(), iter([40, after])
    monkeypatch.setattr("tensorcomp_ext.data.load", lambda *args, **options: images)
    monkeypatch.setattr("tensorcomp_ext.recipes.evaluate", lambda *a, **o: Accuracy(next(scores), 40))
    words = ["--model", "lenet5", "--weights", weights, "--dataset", "digits", "--rank", "4", "--no-tune"]
    outcome = run("compress", *words, *FAST)
    warning = [line for line in outcome.stderr.splitlines() if "lost accuracy" in line]
    assert len(warning) == warns
    if warns:
        for expected in ("35 of 40", "40 before", "--epochs 3", "energy:0.95"):
            assert expected in warning[0]
    assert "MACs are those of the plan that runs" in outcome.stdout


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    outcome = run("compress", "--model", "lenet5", "--dataset", "digits", code=1)
    assert "pip install 'tensorcomp_ext[demo]'" in outcome.stderr
    assert "pip install --no-build-isolation '.[demo]'" in outcome.stderr


def test_noisy_latencies_state_no_speed_up():
    calm, slow, noisy = ([p50, p50, p90] for p50, p90 in ((0.002, 0.003), (0.0021, 0.003), (0.001, 0.003)))
    for after, expected in ((slow, "1.05× slower"), (noisy, "noisy")):
        taken = {"dense": Latency(*calm)._asdict(), "compressed": Latency(*after)._asdict()}
        table = summary_table({"latency": {"1": taken}})
        assert next(iter(table.columns[3].cells)) == expected


def test_compress_takes_its_own_checkpoints(checkpoint):
    words = ["--model", "lenet5", "--weights", checkpoint, "--rank", 2, "--no-tune", "--json"]
    found = json.loads(run("compress", *words, *FAST).stdout)
    assert {layer["skipped"] for layer in found["report"]["layers"]} >= {"already factorised"}


@pytest.mark.slow
def test_published_resnet32_keeps_its_score(data_dir):
    weights, images = data_dir / "weights/akamaster/resnet32-d509ac18.th", data_dir / "cifar-10-batches-bin"
    if not weights.is_file() or not images.is_dir():
        pytest.skip(f"{data_dir} holds no unpacked CIFAR-10 (binary version) with the published weights")
    words = ["--model", "resnet32", "--weights", weights, "--data", images, "--rank", "energy:0.95"]
    found = json.loads(run("compress", *words, "--no-tune", "--json", *FAST).stdout)
    assert found["accuracy"]["before"] == {"correct": 4613, "total": 5000}
    assert found["accuracy"]["decomposed"]["correct"] > 4000
    assert found["report"]["model_ratio"] > 1.2


def test_report_shows_what_was_saved(checkpoint, tmp_path):
    text = run("report", checkpoint, "--html", tmp_path / "report.html").stdout
    header = read_header(checkpoint)
    assert header.report is not None
    assert all(layer.name in text for layer in header.report.replaced)
    found = json.loads(run("report", checkpoint, "--json").stdout)
    assert found["layers"] == header.layers and found["report"]["layer_ratio"] == header.report.layer_ratio
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_tune_keeps_its_choice_in_the_file(checkpoint, tmp_path):
    output = tmp_path / "tuned"
    words = ["--checkpoint", checkpoint, "--batch", "1,2", "--output", output, "--json"]
    found = json.loads(run("tune", *words).stdout)
    header = read_header(output)
    for name, batches in found["layers"].items():
        assert set(batches) == {"1", "2"}
        tuned = header.plans["layers"][name]["tuned"]
        assert {entry["plan"] for entry in tuned.values()} == {
            next(c["name"] for c in batches[size] if c["chosen"]) for size in batches
        }
    assert read_header(checkpoint).plans["layers"][name]["tuned"] == {}


@pytest.mark.parametrize(
    "words",
    [
        ["compress"],
        ["compress", "--model", "resnet9"],
        ["compress", "--model", "lenet5", "--rank", "some"],
        ["compress", "--model", "lenet5", "--rank", "0"],
        ["compress", "--model", "lenet5", "--rank", "4", "--rank", "8"],
        ["compress", "--model", "lenet5", "--weights", "/nowhere.th"],
        ["compress", "--model", "lenet5", "--dataset", "imagenet"],
        ["compress", "--model", "lenet5", "--finetune-epochs", "1"],
        ["compress", "--model", "lenet5", "--recalibrate"],
        ["compress", "--model", "lenet5", "--recipe", "lowrank-sparse"],
        [
            "compress",
            "--model",
            "lenet5",
            "--recipe",
            "sparser",
            "--finetune-epochs",
            "1",
            "--dataset",
            "digits",
        ],
        ["compress", "--model", "lenet5", "--sparsity", "0.8"],
        ["compress", "--model", "lenet5", "--low-rank", "tt"],
        [*RECIPE, "--rank", "4"],
        [*RECIPE, "--format", "tt"],
        [*RECIPE, "--low-rank", "lowrank_sparse"],
        [*RECIPE, "--low-rank", "conv=tucker2"],
        [*RECIPE, "--low-rank", "tt", "--low-rank", "cp"],
        [*RECIPE, "--low-rank", "conv=tucker2", "--low-rank", "linear=lowrank_sparse"],
        [*RECIPE, "--mode", "sum"],
        [*RECIPE, "--init", "zero"],
        [*RECIPE, "--sparsity", "1.5"],
        [*RECIPE, "--sparsity", "1"],
        [*RECIPE, "--sparsity", "nan"],
        [*RECIPE, "--fraction", "0"],
        [*RECIPE, "--storage", "0"],
        [*RECIPE, "--temperature", "0"],
        [*RECIPE, "--alpha", "2"],
        [*RECIPE, "--prune-epochs", "3"],
        [*RECIPE, "--resume", "/nowhere/at/all/x"],
        ["compress", "--model", "lenet5", "--resume", "x"],
        ["compress", "--model", "lenet5", "--resume", "x", "--finetune-epochs", "1", "--dataset", "digits"],
        ["compress", "--model", "lenet5", "--alpha", "0.5"],
        [*RECIPE, "--sparsity-schedule", "linear"],
        [*RECIPE, "--criterion", "size"],
        [*RECIPE, "--criterion", "difference"],
        [*RECIPE, "--direction", "both"],
        [*RECIPE, "--optimizer", "lion"],
        ["compress", "--model", "lenet5", "--batch", "1,many"],
        ["compress", "--model", "lenet5", "--batch", "0"],
        ["compress", "--model", "lenet5", "--output", "/nowhere/at/all/x"],
        ["compress", "--model", "lenet5", "--rank", "4", "--format", "tucker3"],
        ["report", "/nowhere.safetensors"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_status_2(words):
    outcome = run(*words, code=2)
    assert outcome.stdout == "" and outcome.stderr


def test_failed_work_is_one_line_and_status_1(tmp_path, weights, checkpoint):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(checkpoint.read_bytes()[:-5])
    other = tmp_path / "other.th"
    torch.save({"state_dict": {"a": torch.zeros(2)}}, other)
    for words in (
        ["report", damaged],
        ["report", weights],
        ["tune", "--checkpoint", damaged],
        ["tune", "--checkpoint", checkpoint, "--model", "resnet20"],
        ["compress", "--model", "lenet5", "--weights", damaged],
        ["compress", "--model", "lenet5", "--weights", other],
        ["compress", "--model", "lenet5", "--weights", weights, "--data", tmp_path],
        ["compress", "--model", "lenet5", "--rank", "nothing=4"],
        ["compress", "--model", "lenet5", "--rank", "4", "--exclude", "convv1"],
    ):
        outcome = run(*words, code=1)
        lines = [line for line in outcome.stderr.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), outcome.stderr
        assert outcome.stdout == ""


def test_hostile_model_options_are_refused(tmp_path):
    model = compress(models.build("lenet5"), rank=4).model
    for options in ({"num_classes": 10**9}, {"num_classes": True, "path": "x"}, {"num_classes": [1]}):
        path = tmp_path / "net"
        save(model, path, meta={"model": {"name": "lenet5", **options}})
        assert "error: " in run("tune", "--checkpoint", path, code=1).stderr
    save(model, path)
    assert "--model" in run("tune", "--checkpoint", path, code=1).stderr
    with pytest.raises(CheckpointError):
        load(path, models.build("resnet20"))
