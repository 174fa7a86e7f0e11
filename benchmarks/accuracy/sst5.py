"""Sentiment in five classes with the word table dense, in TT-matrix cores of one rank, and with l0 gates.

``python -m benchmarks.accuracy.sst5 --data DIR --json benchmarks/results/sst5.json``

DIR, or DIR/text, holds ``sst5_train.txt`` and ``sst5_dev.txt``, and ``sst5_test.txt`` if you have it: without
the official test split figures are of the dev split, which nothing is chosen by. A two-layer bidirectional
LSTM is trained from random weights in the same loop for every row. What is published took 30 epochs at a
learning rate of 5e-4; here there are fewer, at a larger rate. The gates have a rate of their own, such that
the penalty alone would shut one after about three fifths of the training, as at the published settings: at a
larger one all shut before the words have learned anything.

Source: the supplement to "Learning Low-Rank Tensor Cores with Probabilistic l0-Regularized Rank Selection for
Model Compression".
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.experiment import Experiment, Row, add_arguments, checked, drive
from tensorcomp_ext import data, models, recipes
from tensorcomp_ext.compress.surgery import count_parameters

SUITE, NAME = "rank_selection", "sst5"
PRESET, RANK = "sst-ttm", 16
CONFIG: dict[str, Any] = {
    "network": "SentimentLSTM",
    "preset": PRESET,
    "rank": RANK,
    "batch_size": 64,
    "optimizer": "adam",
    "schedule": "cosine",
    "published": {"epochs": 30, "lr": 5e-4, "dense": 37.4, "tt16": [41.1, 182], "l0": [42.2, 449]},
}


def rows(seeds: list[int]) -> list[Row]:
    """All ways under one seed after the other, then a stronger penalty."""
    found = []
    for seed in seeds:
        found.append(Row("dense", NAME, seed))
        found.append(Row("uniform", NAME, seed, {"rank": RANK}))
        found.append(Row("l0", NAME, seed, {"weight": 0.005}))
    return [*found, *(Row("l0", NAME, seed, {"weight": 0.05}) for seed in seeds)]


def run(row: Row, checkpoint: Path, *, root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """One row: the network, trained and counted."""
    sentences = data.load_text(NAME, root)
    assert isinstance(sentences, data.SentenceDataset)
    task = recipes.SentenceTask(sentences)
    torch.manual_seed(row.seed)
    dense = models.SentimentLSTM(len(sentences.vocabulary), len(sentences.classes))
    shared = ("epochs", "lr", "batch_size", "optimizer", "schedule")
    training = {name: config[name] for name in shared}
    training |= {"weight_decay": 0.0, "seed": row.seed, "checkpoint": checkpoint, "test_each_epoch": True}
    before, details = count_parameters(dense), {}
    table = count_parameters(dense.embedding)
    if row.method == "dense":
        history = recipes.train(dense, task, **training).history
        model: torch.nn.Module = dense
    elif row.method == "uniform":
        model, report, history = recipes.uniform(dense, task, preset=PRESET, **row.options, **training)
    else:
        gates = {"rank": RANK, "gate_lr": config["gate_lr"]}
        model, report, history = recipes.l0(dense, task, preset=PRESET, **gates, **row.options, **training)
        details["ratio_with_gates"] = report.details["l0"]["ratio_with_gates"]
    if row.method != "dense":
        details["ranks"] = list(report["embedding"].rank or ())
    test, figures = task.evaluate(model)
    stored = count_parameters(model.get_submodule("embedding"))
    return {
        "test": {"correct": test.correct, "total": test.total},
        "accuracy": test.fraction,
        **figures,
        "parameters": count_parameters(model),
        "ratio": before / count_parameters(model),
        "table": stored,
        "table_ratio": table / stored,
        **details,
        "history": [entry.to_dict() for entry in history],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--seeds", default="0,1,2", help="of weights and order, by commas")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--gate-lr", type=float, default=2.0, help="learning rate of gates over that of weights"
    )
    options = checked(parser, arguments)
    root = options.data / "text" if (options.data / "text").is_dir() else options.data
    sentences = data.load_text(NAME, root)
    assert isinstance(sentences, data.SentenceDataset)
    config = {
        **CONFIG,
        "epochs": options.epochs,
        "lr": options.lr,
        "gate_lr": options.gate_lr,
        "sentences": [len(sentences.train), len(sentences.test)],
        "tested": sentences.tested,
        "vocabulary": len(sentences.vocabulary),
    }
    seeds = [int(seed) for seed in options.seeds.split(",")]
    return drive(
        Experiment(SUITE, NAME, config, rows(seeds), partial(run, root=root, config=config)), options
    )


if __name__ == "__main__":
    sys.exit(main())
