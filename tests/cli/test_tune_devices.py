"""``tensorcomp tune`` on the device it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tensorcomp_ext import models
from tensorcomp_ext.cli.main import app
from tensorcomp_ext.cli.tune import parse_device
from tensorcomp_ext.compress import compress, save
from tensorcomp_ext.plan import TuneResult


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "lenet5"
    save(compress(models.build("lenet5"), rank=4).model, path, meta={"model": {"name": "lenet5"}})
    return path


def run(*words: object, code: int = 0) -> Any:
    outcome = CliRunner().invoke(app, ["tune", "--batch", "1", *(str(word) for word in words)])
    assert outcome.exit_code == code, (outcome.output, outcome.exception)
    return outcome


def test_devices_there_are_not(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--checkpoint", checkpoint]
    assert "torch has 0 CUDA devices" in " ".join(run(*words, "--device", "cuda", code=2).stderr.split())
    for device in ("tpu", "meta", "cpu:x"):
        assert "cuda:1" in run(*words, "--device", device, code=2).stderr
    outcome = run(*words, "--cuda-graphs", code=2)
    assert "--device cuda" in " ".join(outcome.stderr.split())


def test_index_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    assert parse_device("cuda") == torch.device("cuda") and parse_device("cpu") == torch.device("cpu")
    with pytest.raises(Exception, match="torch has 2 CUDA devices"):
        parse_device("cuda:2")


def test_device_and_graphs_reach_the_tuner(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def tuned(model: torch.nn.Module, examples: list[torch.Tensor], **options: Any) -> TuneResult:
        given.append((examples[0].device.type, options["cuda_graphs"], options["training"]))
        return TuneResult()

    monkeypatch.setattr("tensorcomp_ext.cli.tune.tune_plans", tuned)
    found = json.loads(run("--checkpoint", checkpoint, "--json", "--device", "cpu", "--training").stdout)
    assert given == [("cpu", False, True)]
    assert all(set(batches) == {"1"} for batches in found["layers"].values())
