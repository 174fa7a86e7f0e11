"""Pretrained ResNets on CIFAR-10: accuracy against measured latency, by how ranks are chosen.

``python -m benchmarks.accuracy.measured_ranks --data DIR --json FILE --threads 2``

DIR holds ``cifar-10-batches-bin`` and ``weights/akamaster/*.th``. Ranks by EVBMF, by energy, by NRMF, which
trains first, by measured latency at three speed-ups (at one of them also with errors of the weights instead
of the outputs, "calibration 0"), and half the channels of every convolution but the stem. Test images are
counted after decomposition, after batch normalisation was measured again, and after fine-tuning; ranks and
all else are of training images. Latencies are those of batches of 64, tuned, dense and compressed in turns in
one process: nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.cifar_resnets import STEM, WEIGHTS, half_width
from benchmarks.accuracy.experiment import Experiment, Row, add_arguments, checked, drive
from tensorcomp_ext import data, models, recipes
from tensorcomp_ext.compress.latency import measure_network
from tensorcomp_ext.compress.surgery import count_parameters
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.plan import tune

CALIBRATION = 256
"""Training images whose inputs to the layers weigh errors, of latency rows that do not say otherwise."""
CONFIG: dict[str, Any] = {
    "images": 10_000,
    "epochs": 1,
    "lr": 0.01,
    "batch_size": 64,
    "nrmf_epochs": 2,
    "nrmf_alpha": 1e-2,
    "latency_batch": 64,
    "measure_seconds": 10.0,
}


def rows(networks: list[str]) -> list[Row]:
    """All ways of one network after the other."""
    found = []
    for network in networks:
        named = {"network": network}
        found += [Row("latency", "cifar10", 0, {**named, "speedup": speedup}) for speedup in (2.0, 1.5, 3.0)]
        found += [Row("vbmf", "cifar10", 0, named), Row("energy", "cifar10", 0, {**named, "p": 0.95})]
        found += [Row("nrmf", "cifar10", 0, named), Row("half-width", "cifar10", 0, named)]
        found.append(Row("latency", "cifar10", 0, {**named, "speedup": 2.0, "calibration": 0}))
    return found


def start(network: str, root: Path) -> tuple[nn.Module, Dataset]:
    """A published network and the images as it reads them."""
    whole = data.load("cifar10", root)
    dense = models.build(network)
    normalization = models.load_weights(dense, root / "weights" / "akamaster" / WEIGHTS[network])
    dense = dense.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return dense, whole if normalization is None else whole.with_normalization(*normalization)


def compressed(row: Row, dense: nn.Module, images: Dataset, config: dict[str, Any]) -> recipes.RecipeResult:
    """The network decomposed, before anything is measured or trained again."""
    training: dict[str, Any] = {"channels_last": True, "batch_size": config["batch_size"], "seed": row.seed}
    if row.method == "nrmf":
        return recipes.nrmf(
            dense,
            images,
            alpha=config["nrmf_alpha"],
            epochs=config["nrmf_epochs"],
            finetune_epochs=0,
            lr=config["lr"],
            **training,
        )
    rule: Any = {
        "half-width": half_width(dense),
        "vbmf": "vbmf",
        "energy": f"energy:{row.options.get('p')}",
        "latency": f"latency:{row.options.get('speedup')}",
    }[row.method]
    training |= {"rank": rule, "batch": config["latency_batch"], "recalibrate": False}
    training["calibration"] = row.options.get("calibration", CALIBRATION)
    if row.method == "half-width":
        training["exclude"] = STEM
    return recipes.posttraining(dense, images, **training)


def run(row: Row, checkpoint: Path, *, root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """One row: compressed, counted, measured, fine-tuned and counted again."""
    dense, whole = start(row.options["network"], root)
    images = whole.first(train=config["images"])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model, report, _ = compressed(row, dense, images, config)
    before = recipes.evaluate(dense, whole, channels_last=True)
    found: dict[str, Any] = {"correct_dense": before.correct}
    found["correct_decomposed"] = recipes.evaluate(model, whole, channels_last=True).correct
    recipes.recalibrate_batchnorm(model, images, channels_last=True)
    found["correct_recalibrated"] = recipes.evaluate(model, whole, channels_last=True).correct
    x = whole.normalize(images.train_images[: config["latency_batch"]])
    x = x.contiguous(memory_format=torch.channels_last)
    tuned = copy.deepcopy(model).eval()
    tune(tuned, x)
    taken = measure_network({"dense": dense, "compressed": tuned}, x, seconds=config["measure_seconds"])
    recipes.finetune(
        model,
        images,
        epochs=config["epochs"],
        lr=config["lr"],
        batch_size=config["batch_size"],
        channels_last=True,
        seed=row.seed,
    )
    test = recipes.evaluate(model, whole, channels_last=True)
    return {
        "test": {"correct": test.correct, "total": test.total},
        **found,
        "speedup": taken["dense"].p50 / taken["compressed"].p50,
        "latency": {name: value._asdict() for name, value in taken.items()},
        "parameters": report.parameters_after,
        "ratio": count_parameters(dense) / report.parameters_after,
        "ranks": {entry.name: list(entry.rank or ()) for entry in report.replaced},
        "latency_rule": _short(report.details.get("latency_rule")),
        "warnings": [str(warning.message) for warning in heard],
    }


def _short(details: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of what a latency rule measured the figures, not the tables."""
    if details is None:
        return None
    return {key: value for key, value in details.items() if isinstance(value, (int, float, str, bool))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--networks", default="resnet32,resnet20,resnet44")
    options = checked(parser, arguments)
    task = partial(run, root=options.data, config=CONFIG)
    found = rows(options.networks.split(","))
    return drive(Experiment("tucker_methods", "measured_ranks", CONFIG, found, task), options)


if __name__ == "__main__":
    sys.exit(main())
