"""Times of networks in tensor rings: answers to 10,000 images and a training step, beside the dense network.

``python -m benchmarks.accuracy.ring_times --network resnet32 --json FILE --threads 2``, and of LeNet-5
``--network lenet5 --data DIR``

The published table of ResNet-32 has the dense network at 3.31 s and 0.113 s, rings of rank 15 and 10 at
4.13 and 4.12 s and 0.108 and 0.106 s, and learned ranks at 4.09 s and 0.160 s, on another machine: what
compares are ratios. Rows take turns in one process. Weights are random: times do not depend on them. Learned
ranks are those of gates of which so many are shut at random that the network is so much smaller, and with
images to train on also those that ten epochs of ``recipes.l0`` really leave.

Source: Table 5 of the supplement to "Learning Low-Rank Tensor Cores with Probabilistic l0-Regularized Rank
Selection for Model Compression".
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.accuracy.experiment import revision
from benchmarks.accuracy.rank_selection import LENET5, images_of
from tensorcomp_ext import models, recipes
from tensorcomp_ext.bench.machine import isa, machine, versions
from tensorcomp_ext.bench.suite import write_json
from tensorcomp_ext.compress.latency import Latency, interleave
from tensorcomp_ext.compress.surgery import count_parameters
from tensorcomp_ext.plan import tune
from tensorcomp_ext.ranks.gaussian_gates import GaussianGate
from tensorcomp_ext.recipes.gated import GatedNetwork
from tensorcomp_ext.recipes.start import factorized

PUBLISHED = {
    "dense": {"inference": 3.31, "training": 0.113},
    "tr15": {"inference": 4.13, "training": 0.108},
    "tr10": {"inference": 4.12, "training": 0.106},
    "gated": {"training": 0.160},
    "gated, 5 times smaller": {"inference": 4.09},
}
"""Of ResNet-32, seconds for 10,000 images, and for a step with 128."""

IMAGES, BATCH, SEED = 10_000, 128, 0
EPOCHS = 10
Pair = tuple[nn.Module, nn.Module | None]
"""The network that is trained, and the one that answers."""


@dataclass(frozen=True)
class Network:
    """What is measured.

    Args:
        options: of ``models.build``.
        shape: of an image.
        preset: layout of the rings.
        ranks: uniform ones.
        start: rank with which gates begin.
        ratios: how many times smaller gates have made the network, where they are at work.
    """

    name: str
    options: dict[str, Any]
    shape: tuple[int, int, int]
    preset: str
    ranks: tuple[int, ...]
    start: int
    ratios: tuple[float, ...]


NETWORKS = {
    "resnet32": Network("resnet32", {"option": "B"}, (3, 32, 32), "resnet-tr", (15, 10), 15, (5.0,)),
    "lenet5": Network("lenet5", {}, (1, 28, 28), "lenet5-tr", (25, 10, 5), 25, (20.0, 60.0)),
}


def gated_network(network: Network, dense: nn.Module, ratio: float) -> tuple[nn.Module, GatedNetwork]:
    """Rings with gates on all ranks, as many shut at random as the ratio asks for."""
    model = factorized("ring_times", dense, rank=network.start, preset=network.preset).model
    gates = GatedNetwork(model, GaussianGate(), count_parameters(dense))
    shut(gates, ratio)
    return model, gates


@torch.no_grad()
def shut(gates: GatedNetwork, ratio: float) -> None:
    """Shut gates at random, one after the other in a fixed order, until the network stores so much less."""
    generator = torch.Generator().manual_seed(SEED)
    locations = gates.locations
    places = [(which, place) for which, location in enumerate(locations) for place in range(len(location))]
    for index in torch.randperm(len(places), generator=generator).tolist():
        if gates.ratio() >= ratio:
            return
        which, place = places[index]
        locations[which][place] = -10.0


class Last(recipes.Callback):
    """Keeps a copy of the network, gates included, as training leaves it."""

    model: nn.Module | None = None

    def on_epoch(self, state: recipes.TrainState) -> None:
        if state.epoch + 1 == state.epochs:
            self.model = copy.deepcopy(state.model)


def learned(network: Network, dense: nn.Module, root: Path) -> tuple[str, Pair]:
    """Ranks learned from images, as ``benchmarks.accuracy.rank_selection`` learns those of LeNet-5."""
    last = Last()
    options: dict[str, Any] = {name: LENET5[name] for name in LENET5 if name not in ("network", "epochs")}
    made = recipes.l0(
        dense, images_of("mnist", root), epochs=EPOCHS, weight=1.0, callbacks=[last], seed=SEED, **options
    )
    assert last.model is not None
    ratio = made.report.details["l0"]["ratio"]
    return f"gated, trained for {EPOCHS} epochs, {ratio:.0f} times smaller", (last.model, made.model)


def networks(network: Network, root: Path | None) -> dict[str, Pair]:
    """By row the networks; what has been learned only where there is a folder with MNIST."""
    torch.manual_seed(SEED)
    dense = models.build(network.name, **network.options)
    found: dict[str, Pair] = {"dense": (dense, copy.deepcopy(dense))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # ranks clipped at small modes, as published counts say
        for rank in network.ranks:
            model = factorized("ring_times", dense, rank=rank, preset=network.preset).model
            found[f"tr{rank}"] = (model, copy.deepcopy(model))
        found["gated"] = (gated_network(network, dense, 0.0)[0], None)
        for ratio in network.ratios:
            late, gates = gated_network(network, dense, ratio)
            gates.remove(0.05)
            answers, gates = gated_network(network, dense, ratio)
            gates.fold()
            found[f"gated, {ratio:g} times smaller"] = (late, answers)
        if root is not None:
            name, pair = learned(network, dense, root)
            found[name] = pair
    for trained, answers in found.values():
        trained.train()
        if answers is not None:
            answers.eval()
    return found


def step_of(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """One step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def answer_of(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """One batch answered."""

    def answer() -> None:
        with torch.inference_mode():
            model(x)

    return answer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet32")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with mnist, to learn ranks of LeNet-5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="of measuring, for each of both tables")
    options = parser.parse_args(arguments)
    network = NETWORKS[options.network]
    torch.set_num_threads(options.threads)
    if options.data is not None and network.name != "lenet5":
        parser.error("--data is for --network lenet5")
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(BATCH, *network.shape, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    built = networks(network, options.data)
    for name, (trained, answers) in built.items():
        trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if name != "dense":
            tune(trained, x, training=True)
        if answers is not None:
            answers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if name != "dense":
                tune(answers, x)
    steps = interleave({n: step_of(a, x, labels) for n, (a, _) in built.items()}, options.seconds)
    answering = {n: answer_of(b, x) for n, (_, b) in built.items() if b is not None}
    answered = interleave(answering, options.seconds)
    rows = [_row(network, name, *built[name], steps[name], answered.get(name)) for name in built]
    results: dict[str, Any] = {
        "suite": "ring_times",
        "network": network.name,
        "batch": BATCH,
        "config": {
            "seed": SEED,
            "seconds": options.seconds,
            "preset": network.preset,
            "start": network.start,
        },
        "machine": machine(),
        "versions": versions(),
        "isa": isa(),
        "threads": options.threads,
        "revision": revision(),
        "rows": rows,
    }
    write_json(options.json, results)
    for row in rows:
        print(row["name"], row["parameters"], row["training"], row["inference"])
    return 0


def _row(
    network: Network,
    name: str,
    trained: nn.Module,
    answers: nn.Module | None,
    step: Latency,
    answered: Latency | None,
) -> dict[str, Any]:
    """One row; inference in seconds for all images."""
    scale = IMAGES / BATCH
    return {
        "name": name,
        "parameters": count_parameters(trained if answers is None else answers),
        "training": step._asdict(),
        "inference": None if answered is None else {k: scale * v for k, v in answered._asdict().items()},
        "published": PUBLISHED.get(name) if network.name == "resnet32" else None,
    }


if __name__ == "__main__":
    sys.exit(main())
