"""The driver of the SST-5 experiment: rows of all ways on a few sentences, gone on with where it stopped."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def rooted():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("data") / "text"
    found.mkdir()
    for split, count in (("train", 130), ("dev", 15)):
        lines = (f"{i % 5} word{i % 5} and {'more ' * (i % 4)}." for i in range(count))
        (found / f"sst5_{split}.txt").write_text("\n".join(lines) + "\n")
    return found.parent


def test_rows_count_tables(folder, tmp_path):
    driver = importlib.import_module("benchmarks.accuracy.sst5")
    path = tmp_path / "sst5.json"
    given = ["--data", str(folder), "--json", str(path), "--seeds", "3", "--epochs", "2"]
    assert driver.main([*given, "--only", "dense,uniform"]) == 0
    first = json.loads(path.read_text())
    assert not first["complete"] and [row["method"] for row in first["rows"]] == ["dense", "uniform"]
    assert driver.main(given) == 0
    found = json.loads(path.read_text())
    assert found["complete"] and found["rows"][:2] == first["rows"]
    assert found["config"]["tested"] == "dev" and found["config"]["sentences"] == [130, 15]
    dense, uniform, soft, hard = found["rows"]
    assert (soft["options"], hard["options"]) == ({"weight": 0.005}, {"weight": 0.05})
    assert dense["table"] == found["config"]["vocabulary"] * 256 and dense["ratio"] == 1
    # Cores of the published modes, whatever the vocabulary.
    assert uniform["table"] == 24_128 and uniform["ranks"] == [16, 16, 16]
    for row in (dense, uniform, soft, hard):
        assert row["parameters"] - row["table"] == dense["parameters"] - dense["table"]
        assert row["test"]["total"] == 15 and len(row["history"]) == 2 and row["test_loss"] > 0
        assert row["history"][-1]["test"] == [row["test"]["correct"], 15] or row["method"] == "l0"
    with pytest.raises(ValueError, match="results of other settings"):
        driver.main([*given[:-1], "3"])
