"""The demonstration, on few images: its files, its numbers, its errors."""

import json
import struct

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from tensorcomp_ext import data, models, recipes
from tensorcomp_ext.cli import demo as module
from tensorcomp_ext.cli.common import Commands
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.compress.storage import load

pytest.importorskip("sklearn")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Calls the command in an empty folder, with little time for measuring."""
    app = typer.Typer(cls=Commands)
    app.command()(module.demo)
    app.callback()(lambda: None)
    monkeypatch.chdir(tmp_path)
    for name in ("TUNE_SECONDS", "LAYER_SECONDS", "NETWORK_SECONDS"):
        monkeypatch.setattr(module, name, 0.002)

    def call(*arguments):
        return CliRunner().invoke(app, ["demo", *arguments])

    return call


@pytest.mark.parametrize(("model", "size"), [("lenet5", 28), ("resnet20", 32)])
def test_digits_end_to_end(run, tmp_path, model, size):
    few = ["--epochs", "1", "--train-images", "96", "--batch", "1,3"]
    outcome = run("--model", model, *few, "--seed", "3", "--json")
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert result["images"] == {"train": 96, "test": 355}
    assert [entry["name"] for entry in result["runs"]] == ["VBMF", "energy 0.95"]
    images = data.load("digits", size=size)
    for entry in result["runs"]:
        report = Report.from_dict(entry["report"])
        details = report.details
        # Hardly trained, the convolutions still have full rank: by energy none of resnet20's gets smaller.
        assert bool(report.replaced) == (entry["name"] == "VBMF" or model == "lenet5")
        assert (report.parameters_after < report.parameters_before) == bool(report.replaced)
        assert report.layers[-1].skipped == "excluded"
        assert set(details["accuracy"]) == {"before", "decomposed", "finetuned"}
        assert set(details["latency"]) == {"1", "3"}
        assert all(layer.latency_after.p50 > 0 and layer.plan for layer in report.replaced)
        # The saved network must answer exactly as many test images as was said.
        path = tmp_path / "runs" / "demo" / f"{entry['name'].replace(' ', '-').lower()}.safetensors"
        assert details["files"]["after"] == path.stat().st_size
        options = {k: v for k, v in result["model"].items() if k != "name"}
        network = load(path, models.build(model, **options)).to(memory_format=torch.channels_last)
        counted = recipes.evaluate(network, images, channels_last=True)
        assert abs(counted.correct - details["accuracy"]["finetuned"]["correct"]) <= 1
        assert sum(p.numel() for p in network.parameters()) == report.parameters_after
    text = (tmp_path / "report.html").read_text()
    assert "http" not in text and "VBMF" in text and "energy 0.95" in text
    correct = result["runs"][0]["report"]["details"]["accuracy"]["finetuned"]["correct"]
    assert f"({correct} of 355)" in text


def test_seed_decides_accuracy_and_ranks(run):
    arguments = ["--model", "lenet5", "--epochs", "1", "--train-images", "64", "--batch", "2", "--json"]
    one, two = (json.loads(run(*arguments).stdout) for _ in range(2))
    assert [e["loss"] for e in one["history"]] == pytest.approx([e["loss"] for e in two["history"]], rel=1e-6)
    for a, b in zip(one["runs"], two["runs"], strict=True):
        assert [layer["rank"] for layer in a["report"]["layers"]] == [
            layer["rank"] for layer in b["report"]["layers"]
        ]


def test_tables_for_people_on_mnist_files(run, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 64), ("t10k", 32)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">4I", 0x803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes(i % 10 for i in range(count))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels)
    files = ["--dataset", "mnist", "--data", str(folder), "--html", "m.html"]
    outcome = run("--model", "lenet5", *files, "--batch", "1")
    assert outcome.exit_code == 0, outcome.output
    for expected in ("lenet5 on mnist", "conv1", "of 32", "same outputs", "m.html"):
        assert expected in outcome.stdout
    assert (tmp_path / "runs" / "demo" / "dense.safetensors").is_file() and (tmp_path / "m.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "resnet21"], 2, "resnet21"),
        (["--dataset", "svhn"], 2, "svhn"),
        (["--dataset", "mnist"], 2, "needs --data"),
        (["--html", "absent/report.html"], 2, "no folder"),
        (["--batch", "0"], 2, "at least 1"),
        (["--dataset", "mnist", "--data", "."], 1, "train-images-idx3-ubyte"),
    ],
)
def test_errors_come_before_any_work(run, tmp_path, arguments, code, message):
    outcome = run(*arguments)
    assert outcome.exit_code == code
    assert message in outcome.output
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "runs").exists()


def test_pickled_cifar_is_told_the_binary_version(run, tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02}q\x01.")
    outcome = run("--dataset", "cifar10", "--data", str(tmp_path))
    assert outcome.exit_code == 1
    assert "cifar-10-binary.tar.gz" in outcome.output
