"""Low-rank + sparse, sparse alone and low rank alone at equal stored sizes: accuracy of the same network.

``python -m benchmarks.accuracy.lowrank_sparse --network lenet5 --data DIR --json lowrank_sparse_lenet5.json``

DIR holds ``fashion-mnist``, or ``cifar-10-batches-bin`` and ``weights/akamaster/*.th``. Every way is trained
on the same images in the same schedule against the same dense network; test images are looked at once a row,
when it is done. ``--choose 0.01,0.03,0.1`` only compares learning rates, on training images held out; results
of the same ``--work`` quote what it found.

A row is written when it is done, and epochs are checkpointed: a killed run started again goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.lowrank_sparse_runs import (
    DENSE,
    FORMATS,
    FRACTION,
    NETWORKS,
    SPLIT_SEED,
    Network,
    Run,
    dense_network,
    images_of,
    runs_of,
)
from tensorcomp_ext.bench.equal_size_summary import EQUAL_SIZE
from tensorcomp_ext.bench.machine import isa, machine, versions
from tensorcomp_ext.bench.suite import write_json
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.recipes import Accuracy, LowRankSparseResult, evaluate, lowrank_sparse

CHOOSE_BY = ("sparse", "lowrank-sparse", "lowrank")


def compressed(
    run: Run, network: Network, dense: nn.Module, images: Dataset, checkpoint: Path, lr: float
) -> LowRankSparseResult:
    """One way, trained; its history has the accuracy on the images held out."""
    return lowrank_sparse(
        dense,
        images,
        **run.options(),
        epochs=network.epochs,
        prune_epochs=network.prune_epochs,
        lr=lr,
        batch_size=network.batch_size,
        optimizer=network.optimizer,
        seed=run.seed,
        channels_last=True,
        test_each_epoch=True,
        checkpoint=checkpoint,
    )


def stored(report: Report) -> dict[str, Any]:
    """What is stored of all layers but the last; what a way had to leave dense counts in full."""
    found = dict(report.details["lowrank_sparse"])
    left = [entry for entry in report.skipped if entry.skipped != "excluded"]
    count = sum(entry.parameters_before for entry in left)
    return {
        "weights": found["weights"] + count,
        "stored": found["stored"] + count,
        "low_rank": found["low_rank"],
        "sparse": found["sparse"],
        "stored_bytes": found["stored_bytes"] + 4 * count,
        "sparsity": found["sparsity"],
        "left_dense": [entry.name for entry in left],
    }


def row_of(
    run: Run, network: Network, dense: nn.Module, whole: Dataset, images: Dataset, work: Path
) -> dict[str, Any]:
    """One finished row."""
    started = time.perf_counter()
    checkpoint = work / f"{run.key}.ckpt"
    model, report, history = compressed(run, network, dense, images, checkpoint, network.lr)
    test = evaluate(model, whole, channels_last=True)
    epochs = [entry.to_dict() for entry in history]
    row = {
        **run.to_dict(),
        "storage_asked": run.storage,
        **stored(report),
        "test": counts(test),
        "history": [{"held_out": entry.pop("test"), **entry} for entry in epochs],
        "layers": [
            {
                "name": entry.name,
                "shape": list(dense.get_submodule(entry.name).weight.shape),
                "format": entry.format,
                "rank": None if entry.rank is None else list(entry.rank),
                "error": entry.relative_error,
                "stored": entry.parameters_after,
            }
            for entry in report.replaced
        ],
        "seconds": time.perf_counter() - started,
        "training_seconds": sum(entry.seconds for entry in history),
    }
    if run in shown(network):
        row["histograms"] = report.details["histograms"]
    return row


def shown(network: Network) -> list[Run]:
    """The rows that keep histograms of weights: pruning, decomposition in TT and their sum at one size."""
    middle = network.sizes[len(network.sizes) // 2]
    return [run for run in runs_of((middle,), ("tt",), (0,), ()) if run.mode != "masking"]


def diverged(error: RuntimeError) -> str:
    """What ``train`` says where the loss is no longer finite; another error is raised again."""
    if "the loss is" not in str(error):
        raise error
    return str(error)


def counts(accuracy: Accuracy) -> dict[str, int]:
    return {"correct": accuracy.correct, "total": accuracy.total}


def choose(
    rates: list[float], network: Network, dense: nn.Module, images: Dataset, work: Path
) -> dict[str, Any]:
    """Correct answers on the images held out after the last epoch, by learning rate and method.

    None where training diverged.
    """
    found: dict[str, Any] = {}
    for lr in rates:
        for method in CHOOSE_BY:
            run = next(r for r in shown(network) if r.method == method)
            path = work / f"choose_{lr:g}_{run.key}.ckpt"
            try:
                last = compressed(run, network, dense, images, path, lr).history[-1].test
            except RuntimeError as error:
                last = None
                print(diverged(error), flush=True)
            found.setdefault(f"{lr:g}", {})[method] = None if last is None else list(last)
            print(f"lr {lr:g}, {method}: {last} of training images held out", flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    test = Accuracy(**row["test"])
    ways = "/".join(row[k] for k in ("method", "format", "mode", "init") if row[k] != "none")
    share = f"{row['stored']:,} of {row['weights']:,} weights ({row['stored'] / row['weights']:.4f})"
    return (
        f"{ways} seed {row['seed']}: {share}, {row['stored_bytes']:,} bytes, {test}, {row['seconds']:.0f} s"
    )


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", required=True, choices=sorted(NETWORKS))
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("TENSORCOMP_DATA"), help="folder of the data"
    )
    parser.add_argument("--json", type=Path, required=True, help="results go here, after every row")
    parser.add_argument("--work", type=Path, help="folder of checkpoints; beside --json unless given")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of " + ", ".join(FORMATS))
    parser.add_argument("--sizes", help="stored shares, the first to measure in the middle")
    parser.add_argument("--seeds", default="0", help="of the order of images; such as 0,1,2")
    parser.add_argument("--masked", help="formats of which both starts are compared, or 'none'")
    for name in ("images", "held-out", "epochs", "prune-epochs", "batch-size"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--dense-epochs", type=int, default=DENSE["epochs"])
    parser.add_argument("--choose", help="learning rates to compare instead, such as 0.01,0.03,0.1")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no row begins")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data is needed (or TENSORCOMP_DATA): the folder with the images and weights")
    options.formats = options.formats.split(",")
    if unknown := [name for name in options.formats if name not in FORMATS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(FORMATS)}")
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.work = options.work or options.json.with_suffix(".work")
    return options


def settings(options: argparse.Namespace) -> Network:
    """The network, with what the command line changes of it."""
    names = ("images", "held_out", "epochs", "prune_epochs", "batch_size", "lr")
    changed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.sizes:
        changed["sizes"] = tuple(float(size) for size in options.sizes.split(","))
    if options.masked:
        changed["masked"] = () if options.masked == "none" else tuple(options.masked.split(","))
    return dataclasses.replace(NETWORKS[options.network], **changed)


def resumed(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Results of an earlier run with the same settings; ValueError where they differ."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("suite") != EQUAL_SIZE or found["config"] != config:
        raise ValueError(f"{path} has results of other settings: move it away, or give another --json")
    return found


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    network = settings(options)
    dense_options = {**DENSE, "epochs": options.dense_epochs}
    config: dict[str, Any] = {
        "dataset": network.dataset,
        "images": network.images,
        "held_out": network.held_out,
        "epochs": network.epochs,
        "prune_epochs": network.prune_epochs,
        "lr": network.lr,
        "schedule": "decay",
        "batch_size": network.batch_size,
        "optimizer": network.optimizer,
        "fraction": FRACTION,
        "split_seed": SPLIT_SEED,
        "threads": options.threads,
        "dense": dense_options if network.weights is None else network.weights,
    }
    results = None if options.choose else resumed(options.json, config)
    whole, _ = images_of(network, options.data)
    dense, whole, source = dense_network(network, whole, options.data, options.work, dense_options)
    images = images_of(network, options.data)[1].with_normalization(whole.mean, whole.std)
    kept = {"rows": [], "diverged": []} if results is None else results
    results = {
        "suite": EQUAL_SIZE,
        "network": network.name,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "machine": machine(),
        "versions": versions(),
        "isa": isa(),
        "config": config,
        **{key: kept[key] for key in ("started", "dense", "rows", "diverged") if key in kept},
    }
    choice = options.work / "choice.json"
    if options.choose:
        rates = [float(rate) for rate in options.choose.split(",")]
        write_json(choice, choose(rates, network, dense, images, options.work))
        return 0
    if choice.exists():
        results["chosen_by"] = json.loads(choice.read_text(encoding="utf-8"))
    if "dense" not in results:
        results["dense"] = {"source": source, **counts(evaluate(dense, whole, channels_last=True))}
        write_json(options.json, results)
    written = [*results["rows"], *results["diverged"]]
    done = {tuple(row[name] for name in Run.__dataclass_fields__) for row in written}
    for run in runs_of(network.sizes, options.formats, options.seeds, network.masked):
        if tuple(run.to_dict().values()) in done:
            continue
        if time.perf_counter() - began > options.limit:
            print("the time is over: started again, the run goes on", flush=True)
            return 0
        try:
            row = row_of(run, network, dense, whole, images, options.work)
            results["rows"].append(row)
            said = line(row)
        except RuntimeError as error:
            said = f"{run.key}: {diverged(error)}"
            results["diverged"].append({**run.to_dict(), "error": diverged(error)})
        write_json(options.json, results)
        (options.work / f"{run.key}.ckpt").unlink(missing_ok=True)
        print(said, flush=True)
    results["complete"] = True
    write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
