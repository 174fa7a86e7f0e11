"""Training methods for Tucker-2 against decomposing and fine-tuning, from the same trained network.

``python -m benchmarks.accuracy.tucker_methods --experiment nrmf_resnet20 --data DIR --json FILE``

DIR holds ``fashion-mnist``, ``cifar-10-batches-bin`` and ``weights/akamaster/*.th``. Experiments:
"nrmf_lenet5" and "nrmf_resnet20", NRMF at several weights of its norm, EVBMF ranks with fine-tuning, and the
dense network trained on as long; "progressive_resnet20", progressive Tucker from both starts and every way of
decomposing at once, at equal stored sizes. All rows see the same images for as many epochs in the same
schedule; test images are looked at once a row, when it is done. Nothing was chosen by them.

Source: Exploiting Elasticity in Tensor Ranks for Compressing Neural Networks (NRMF); Progressive Model
Compression with Adaptive Rank Selection in Tucker Decomposition.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.experiment import Experiment, Row, add_arguments, checked, drive
from tensorcomp_ext import data, models, recipes
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.compress.surgery import count_parameters
from tensorcomp_ext.data import Dataset

SUITE = "tucker_methods"
RESNET20: dict[str, Any] = {
    "network": "resnet20",
    "weights": "weights/akamaster/resnet20-12fca82f.th",
    "dataset": "cifar10",
    "images": 10_000,
    "epochs": 6,
    "lr": 0.01,
    "batch_size": 64,
}
LENET5: dict[str, Any] = {
    "network": "lenet5",
    "weights": None,
    "dense_epochs": 6,
    "dataset": "fashion-mnist",
    "images": 20_000,
    "epochs": 9,
    "lr": 0.01,
    "batch_size": 64,
}
TRAINING = {"schedule": "cosine", "weight_decay": 1e-4, "channels_last": True}
ALPHAS = (1e-3, 1e-2, 1e-1)
METHODS = ("tsvd", "cp", "tucker", "tucker2", "tt", "tr", "energy")


def nrmf_rows(dataset: str, seeds: list[int]) -> list[Row]:
    """The norm as published and as the sum of singular values, EVBMF, and no compression."""
    found = []
    for seed in seeds:
        found += [Row("nrmf", dataset, seed, {"alpha": alpha}) for alpha in ALPHAS]
        found += [Row("nrmf", dataset, seed, {"alpha": alpha, "norm": "nuclear"}) for alpha in ALPHAS]
        found += [Row("vbmf", dataset, seed), Row("dense", dataset, seed)]
    return found


def progressive_rows(dataset: str, seeds: list[int]) -> list[Row]:
    """Both starts, one of them with a quicker fade, too, and all ways of decomposing, at two sizes."""
    found = []
    for seed in seeds:
        for target in (0.3, 0.15):
            starts: list[dict[str, Any]] = [{"target": target, "init": init} for init in ("residual", "lora")]
            starts.append({**starts[0], "decay": "sine", "share": 0.5})
            found += [Row("progressive", dataset, seed, options) for options in starts]
            found += [Row(method, dataset, seed, {"target": target}) for method in METHODS]
        found.append(Row("dense", dataset, seed))
    return found


EXPERIMENTS = {
    "nrmf_lenet5": (LENET5, nrmf_rows),
    "nrmf_resnet20": (RESNET20, nrmf_rows),
    "progressive_resnet20": (RESNET20, progressive_rows),
}


def start(config: Mapping[str, Any], root: Path, work: Path) -> tuple[nn.Module, Dataset, Dataset]:
    """The trained network, all images with the normalisation it was trained with, and those learned from."""
    whole = data.load(config["dataset"], root)
    torch.manual_seed(0)
    dense = models.build(config["network"])
    if config["weights"] is None:
        options = {"epochs": config["dense_epochs"], "lr": 0.05, "seed": 0, "channels_last": True}
        recipes.train(dense, whole, **options, checkpoint=work / "dense.trained")
    else:
        normalization = models.load_weights(dense, root / config["weights"])
        whole = whole if normalization is None else whole.with_normalization(*normalization)
    return dense.eval(), whole, whole.first(train=config["images"])


def run(row: Row, checkpoint: Path, *, root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """One row: the network, compressed, trained and counted."""
    dense, whole, images = start(config, root, checkpoint.parent)
    before = count_parameters(dense)
    epochs = config["epochs"]
    training: dict[str, Any] = {**TRAINING, "lr": config["lr"], "batch_size": config["batch_size"]}
    training |= {"seed": row.seed, "checkpoint": checkpoint}
    details: dict[str, Any] = {}
    options: dict[str, Any] = dict(row.options)
    if row.method == "dense":
        model = copy.deepcopy(dense)
        history = recipes.train(model, images, epochs=epochs, **training).history
    else:
        if row.method == "nrmf":
            after = epochs // 3
            phases = {"epochs": epochs - after, "finetune_epochs": after, "finetune_lr": config["lr"]}
            made = recipes.nrmf(dense, images, **phases, **options, **training)
        elif row.method == "progressive":
            made = recipes.progressive(dense, images, epochs=epochs, **options, **training)
        else:
            target = options.get("target")
            chosen = {"method": row.method, "target": target}
            made = recipes.decompose_finetune(dense, images, epochs=epochs, **chosen, **training)
        model, history = made.model, made.history
        details = figures(made.report)
    test = recipes.evaluate(model, whole, channels_last=True)
    stored = count_parameters(model)
    return {
        "test": {"correct": test.correct, "total": test.total},
        "accuracy": test.fraction,
        "parameters": stored,
        "ratio": before / stored,
        **details,
        "history": [{"loss": e.loss, "train": e.train.fraction, "seconds": e.seconds} for e in history],
        "trends": [found for e in history if (found := trend(e.extra)) is not None],
    }


def figures(report: Report) -> dict[str, Any]:
    """Ranks, and of what the compressible layers store the share."""
    ranks = {entry.name: list(entry.rank or ()) for entry in report.replaced}
    stored = [d["stored_share"] for d in report.details.values() if "stored_share" in d]
    return {"ranks": ranks, **({"stored_share": stored[0]} if stored else {})}


def trend(extra: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of an epoch under the norm its value, and of each layer ranks and effective ranks; else None."""
    found = extra.get("nuclear_norm")
    if found is None:
        return None
    kept = ("rank_out", "rank_in", "effective_out", "effective_in")
    layers = {name: [figures[key] for key in kept] for name, figures in found["layers"].items()}
    return {"norm": found["value"], "layers": layers}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--experiment", required=True, choices=sorted(EXPERIMENTS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int)
    options = checked(parser, arguments)
    config, rows_of = EXPERIMENTS[options.experiment]
    changed = {name: getattr(options, name) for name in ("epochs", "images") if getattr(options, name)}
    config = {**config, **TRAINING, **changed}
    rows = rows_of(config["dataset"], [int(seed) for seed in options.seeds.split(",")])
    task = partial(run, root=options.data, config=config)
    return drive(Experiment(SUITE, options.experiment, config, rows, task), options)


if __name__ == "__main__":
    sys.exit(main())
