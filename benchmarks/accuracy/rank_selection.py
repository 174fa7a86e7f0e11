"""Ranks learned while training, against uniform ranks: accuracy by compression, from random cores.

``python -m benchmarks.accuracy.rank_selection --experiment lenet5_rings --data DIR --json lenet5_rings.json``

DIR holds ``mnist`` and ``fashion-mnist``. Experiments: "lenet5_rings", LeNet-5 in tensor rings, uniform, with
l0 gates, free and frozen at a size, with less noise in them, and by REINFORCE; "mlp_trains", a network
784-625-10 in TT-matrices, uniform, with l0 gates and with MARS. All rows of an experiment are trained in the
same loop, without augmentation, far shorter than published and therefore with larger learning rates, of gates
above all: at the published ones none could shut in so few steps. The learning rate of LeNet-5 was chosen with
uniform ranks on training images held out. Test images are looked at once a row, when it is done.

Source: the supplement to "Learning Low-Rank Tensor Cores with Probabilistic l0-Regularized Rank Selection for
Model Compression"; Kodryan et al. 2023 (MARS).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.experiment import Experiment, Row, add_arguments, checked, drive
from tensorcomp_ext import data, models, recipes
from tensorcomp_ext.compress.surgery import count_parameters
from tensorcomp_ext.recipes import Epoch

NORMALIZATION = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
}
SUITE = "rank_selection"
LENET5: dict[str, Any] = {
    "network": "lenet5",
    "preset": "lenet5-tr",
    "rank": 25,
    "epochs": 10,
    "lr": 2e-3,
    "gate_lr": 2.5,
    "batch_size": 128,
    "optimizer": "adam",
    "schedule": "cosine",
    "remove_every": 100,
}
MLP: dict[str, Any] = {
    "network": "mlp",
    "preset": "mlp-ttm",
    "rank": 20,
    "epochs": 30,
    "lr": 1e-2,
    "gate_lr": 1.0,
    "batch_size": 128,
    "optimizer": "adam",
    "schedule": "decay",
    "remove_every": 100,
}
TARGETS = (26.0,)
"""Ratios at which gates of LeNet-5 are frozen: that of a uniform rank of 10."""
RECIPES: dict[str, Callable[..., recipes.RecipeResult]] = {
    "uniform": recipes.uniform,
    "l0": recipes.l0,
    "reinforce": recipes.reinforce,
    "mars": recipes.mars,
}


def lenet5_rows(datasets: list[str], seeds: list[int]) -> list[Row]:
    """Uniform ranks, gates at three weights and up to their sizes, less noise, and REINFORCE, the slowest."""
    found = []
    for seed in seeds:
        for name in datasets:
            found += [Row("uniform", name, seed, {"rank": rank}) for rank in (5, 10, 15, 20, 25)]
            found += [Row("l0", name, seed, {"weight": weight}) for weight in (0.2, 0.5, 1.0)]
            found += [Row("l0", name, seed, {"weight": 1.0, "target": target}) for target in TARGETS]
            found.append(Row("dense", name, seed))
    for sigma in (0.1, 0.3):
        found += [Row("l0", name, seeds[0], {"weight": 1.0, "sigma": sigma}) for name in datasets]
    found += [Row("reinforce", name, seed, {"weight": 0.2}) for seed in seeds for name in datasets]
    return found


def mlp_rows(datasets: list[str], seeds: list[int]) -> list[Row]:
    """Uniform ranks, MARS in both strengths, and gates at three weights."""
    found = []
    for seed in seeds:
        for name in datasets:
            found += [Row("uniform", name, seed, {"rank": rank}) for rank in (3, 5, 10, 20)]
            found += [Row("mars", name, seed, {"strength": strength}) for strength in ("soft", "hard")]
            found += [Row("l0", name, seed, {"weight": weight}) for weight in (0.05, 0.2, 1.0)]
            found.append(Row("dense", name, seed))
    return found


EXPERIMENTS: dict[str, tuple[dict[str, Any], Callable[[list[str], list[int]], list[Row]], str]] = {
    "lenet5_rings": (LENET5, lenet5_rows, "mnist,fashion-mnist"),
    "mlp_trains": (MLP, mlp_rows, "mnist"),
}


def images_of(name: str, root: Path) -> data.Dataset:
    """A data set with the published normalisation."""
    mean, std = NORMALIZATION[name]
    return replace(data.load(name, root), mean=mean, std=std)


def run(row: Row, checkpoint: Path, *, root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """One row: the network, trained and counted."""
    images = images_of(row.dataset, root)
    torch.manual_seed(row.seed)
    dense = models.build(config["network"])
    shared = ("epochs", "lr", "batch_size", "optimizer", "schedule")
    training = {name: config[name] for name in shared}
    training |= {"weight_decay": 0.0, "seed": row.seed, "channels_last": True, "checkpoint": checkpoint}
    parameters = count_parameters(dense)
    details: dict[str, Any] = {}
    if row.method == "dense":
        training["lr"] = 1e-3  # dense weights diverge at the cores' rate; Adam's usual one
        history = recipes.train(dense, images, **training).history
        model = dense
    else:
        options: dict[str, Any] = dict(row.options)
        if row.method != "uniform":
            options |= {name: config[name] for name in ("rank", "gate_lr", "remove_every")}
        made = RECIPES[row.method](dense, images, preset=config["preset"], **options, **training)
        model, history = made.model, made.history
        details["ranks"] = {entry.name: list(entry.rank or ()) for entry in made.report.replaced}
        if row.method != "uniform":
            details["ratio_with_gates"] = made.report.details[row.method]["ratio_with_gates"]
    test = recipes.evaluate(model, images, channels_last=True)
    stored = count_parameters(model)
    return {
        "test": {"correct": test.correct, "total": test.total},
        "accuracy": test.fraction,
        "parameters": stored,
        "ratio": parameters / stored,
        **details,
        "history": [_line(entry) for entry in history],
    }


def _line(entry: Epoch) -> dict[str, Any]:
    """What is kept of an epoch."""
    extra = {key: value for key, value in entry.extra.items() if key != "ranks"}
    return {"loss": entry.loss, "train": entry.train.fraction, "seconds": entry.seconds, **extra}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--experiment", required=True, choices=sorted(EXPERIMENTS))
    parser.add_argument("--datasets", help="such as mnist,fashion-mnist")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int)
    options = checked(parser, arguments)
    config, rows_of, datasets = EXPERIMENTS[options.experiment]
    if options.epochs is not None:
        config = {**config, "epochs": options.epochs}
    names = (options.datasets or datasets).split(",")
    rows = rows_of(names, [int(seed) for seed in options.seeds.split(",")])
    task = partial(run, root=options.data, config=config)
    return drive(Experiment(SUITE, options.experiment, config, rows, task), options)


if __name__ == "__main__":
    sys.exit(main())
