"""Pretrained ResNet-20/32/44 on CIFAR-10, compressed: accuracy and latency of the same network side by side.

``python -m benchmarks.accuracy.cifar_resnets --data DIR --json benchmarks/results/cifar_resnets.json``

DIR holds ``cifar-10-batches-bin`` and ``weights/akamaster/*.th``. Each network is decomposed to Tucker-2 with
three rank rules, counted on the test images before, after decomposition and after one epoch of fine-tuning on
training images, and timed, tuned, against the dense network at several batch sizes. Ranks and hyperparameters
are fixed here; nothing is chosen on test images.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorcomp_ext import data, models
from tensorcomp_ext.bench.cases import LAYOUTS
from tensorcomp_ext.bench.machine import isa, machine, versions
from tensorcomp_ext.bench.suite import write_json
from tensorcomp_ext.bench.timing import Effort, interleave
from tensorcomp_ext.compress import CompressionResult, compress
from tensorcomp_ext.nn import FactorizedConv2d
from tensorcomp_ext.plan import tune
from tensorcomp_ext.ranks import VBMF, Energy
from tensorcomp_ext.recipes import evaluate, finetune

WEIGHTS = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet44": "resnet44-014dd654.th",
}
STEM = "conv1"
EFFORT = Effort(budget_s=6.0, min_rounds=15, max_rounds=201, warmup_s=0.05)
BATCHES = (1, 8, 64)
EPOCHS, LEARNING_RATE = 1, 0.01


def half_width(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Ranks (T // 2, S // 2) for every convolution but the stem."""
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {n: (m.out_channels // 2, m.in_channels // 2) for n, m in convolutions.items() if n != STEM}


RULES: dict[str, Callable[[nn.Module], Any]] = {
    "energy 0.95": lambda model: Energy(0.95),
    "vbmf": lambda model: VBMF(),
    "half width": half_width,
}


def convolutions(model: nn.Module) -> list[str]:
    """What is decomposed: every convolution but the stem, whose three input channels leave nothing to
    save."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != STEM]


def chain_macs(result: CompressionResult) -> int:
    """MACs of one image with every replaced layer run from its factors, whatever plan is the fastest."""
    count = result.report.macs_before or 0
    for entry in result.report.replaced:
        layer = result.model.get_submodule(entry.name)
        assert isinstance(layer, FactorizedConv2d) and entry.input_shape is not None
        count += layer.macs(entry.input_shape) - layer.dense_macs(entry.input_shape)
    return count


def latencies(
    dense: nn.Module, compressed: nn.Module, shape: Sequence[int], batches: Sequence[int]
) -> dict[str, Any]:
    """Both networks at each batch size in both memory layouts, interleaved, after tuning for exactly these
    inputs."""
    found = {}
    nets = {
        f"{name} {layout}": copy.deepcopy(net).eval().to(memory_format=form)  # type: ignore[call-overload]
        for name, net in (("dense", dense), ("compressed", compressed))
        for layout, form in LAYOUTS.items()
    }
    for batch in batches:
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        inputs = {layout: x.contiguous(memory_format=form) for layout, form in LAYOUTS.items()}
        with torch.inference_mode():
            chosen = [tune(nets[f"compressed {layout}"], x).to_dict() for layout, x in inputs.items()]
            calls = {key: functools.partial(net, inputs[key.split()[1]]) for key, net in nets.items()}
            timed = interleave(calls, EFFORT)
        best = {
            name: min((key for key in timed if key.startswith(name)), key=lambda key: timed[key].median_us)
            for name in ("dense", "compressed")
        }
        plans: dict[str, int] = {}
        for layer in (layer for result in chosen for layer in result["layers"]):
            plans[layer["choice"]] = plans.get(layer["choice"], 0) + 1
        dense_us, compressed_us = (timed[best[name]].median_us for name in ("dense", "compressed"))
        found[str(batch)] = {
            "timings": {key: timing.to_dict() for key, timing in timed.items()},
            "dense_us": dense_us,
            "compressed_us": compressed_us,
            "best": best,
            "ratio": dense_us / compressed_us,
            "ratio_by_layout": {
                layout: timed[f"dense {layout}"].median_us / timed[f"compressed {layout}"].median_us
                for layout in inputs
            },
            "plans": plans,
        }
    return found


def measure(name: str, rule: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One network under one rank rule."""
    dense = models.build(name).eval()
    path = folder / "weights" / "akamaster" / WEIGHTS[name]
    images = data.load("cifar10", folder)
    normalization = models.load_weights(dense, path)
    if normalization is not None:
        images = images.with_normalization(*normalization)
    if options.quick:
        images = images.first(train=256, test=256)
    shape = tuple(images.test_images.shape[1:])
    before = evaluate(dense, images)
    example = torch.zeros(1, *shape)
    result = compress(
        dense, rank=RULES[rule](dense), example_inputs=example, layers=convolutions(dense), exclude=(STEM,)
    )
    decomposed = evaluate(result.model, images)
    row: dict[str, Any] = {
        "network": name,
        "rule": rule,
        "parameters": {
            "dense": result.report.parameters_before,
            "compressed": result.report.parameters_after,
        },
        "macs": {"dense": result.report.macs_before, "compressed": chain_macs(result)},
        "ranks": {layer.name: layer.rank for layer in result.report.replaced},
        "left_dense": {layer.name: layer.skipped for layer in result.report.skipped},
    }
    model = result.model
    finetune(model, images, epochs=EPOCHS, lr=LEARNING_RATE, seed=options.seed, channels_last=True)
    finetuned = evaluate(model, images)
    row["accuracy"] = {
        "total": before.total,
        "before": before.correct,
        "decomposed": decomposed.correct,
        "finetuned": finetuned.correct,
    }
    row["latency"] = latencies(dense, model, shape, options.batches)
    return row


def line(row: dict[str, Any]) -> str:
    accuracy = row["accuracy"]
    ratios = ", ".join(f"batch {batch} {entry['ratio']:.2f}x" for batch, entry in row["latency"].items())
    counts = " -> ".join(str(accuracy[key]) for key in ("before", "decomposed", "finetuned"))
    sizes = row["parameters"]
    return (
        f"{row['network']} {row['rule']}: {sizes['dense']:,} -> {sizes['compressed']:,} parameters, "
        f"correct {counts} of {accuracy['total']}; dense / compressed {ratios}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("TENSORCOMP_DATA"), help="folder of the data"
    )
    parser.add_argument("--json", type=Path, required=True, help="results go here, after every network")
    parser.add_argument("--networks", default=",".join(WEIGHTS), help="of " + ", ".join(WEIGHTS))
    parser.add_argument("--rules", default=",".join(RULES), help="of " + ", ".join(RULES))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="256 images: does it run?")
    options = parser.parse_args(arguments)
    networks, rules = options.networks.split(","), options.rules.split(",")
    options.batches = [int(batch) for batch in options.batches.split(",")]
    for chosen, known in ((networks, WEIGHTS), (rules, RULES)):
        unknown = [value for value in chosen if value not in known]
        if unknown:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    if options.data is None:
        parser.error(
            "--data is needed (or TENSORCOMP_DATA): the folder with cifar-10-batches-bin and weights"
        )
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "suite": "cifar_resnets",
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "machine": machine(),
        "versions": versions(),
        "isa": isa(),
        "config": {
            "threads": options.threads,
            "seed": options.seed,
            "batches": options.batches,
            "epochs": EPOCHS,
            "learning_rate": LEARNING_RATE,
            "quick": options.quick,
            "effort": EFFORT.to_dict(),
            "left_dense": [STEM, "linear"],
        },
        "rows": [],
    }
    for name in networks:
        for rule in rules:
            row = measure(name, rule, options.data, options)
            results["rows"].append(row)
            write_json(options.json, results)
            print(line(row), flush=True)
    results["complete"] = True
    write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
