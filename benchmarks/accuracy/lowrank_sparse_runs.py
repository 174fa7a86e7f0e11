"""Which networks are compressed in which ways, and on which images, to compare ways that store as much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorcomp_ext import data, models
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.recipes import train

FORMATS: dict[str, str | dict[str, str]] = {
    "cp": "cp",
    "tucker": "tucker",
    "tt": {"conv": "tt", "linear": "ttm"},
}
"""Low-rank parts: names here, and formats of convolutions and of linear layers."""

FRACTION = 0.1
"""Share of the weights that the low-rank part of low-rank + sparse takes (Hawkins et al. 2021)."""

SPLIT_SEED = 2021
DENSE = {"epochs": 6, "lr": 0.05, "seed": 0}


@dataclass(frozen=True)
class Network:
    """A network, where its images and weights are, and how all ways of compressing it are trained.

    Args:
        name, dataset: of ``models.build`` and ``data.load``.
        weights: file under the data folder; None to train it first.
        sizes: stored shares of the compressed layers' weights, the one measured first in the middle.
        images, held_out: training images used, and those kept to choose by and for the history.
        epochs, prune_epochs, lr, batch_size, optimizer: of every way.
        masked: formats whose fit without the outliers takes part.
    """

    name: str
    dataset: str
    weights: str | None
    sizes: tuple[float, ...]
    images: int
    held_out: int
    epochs: int
    prune_epochs: int
    lr: float
    batch_size: int
    optimizer: str
    masked: tuple[str, ...]


NETWORKS = {
    "lenet5": Network(
        "lenet5",
        "fashion-mnist",
        None,
        (0.2, 0.15, 0.11),
        5120,
        1000,
        8,
        5,
        0.01,
        128,
        "sgd",
        ("tt", "tucker", "cp"),
    ),
    "resnet20": Network(
        "resnet20",
        "cifar10",
        "weights/akamaster/resnet20-12fca82f.th",
        (0.3, 0.2, 0.15),
        1536,
        500,
        6,
        4,
        0.003,
        32,
        "sgd",
        ("tt", "tucker"),
    ),
}


@dataclass(frozen=True)
class Run:
    """One way of compressing a network; what tells its row from others."""

    method: str
    format: str
    mode: str
    init: str
    storage: float
    seed: int

    @property
    def key(self) -> str:
        """Name of the row, and of its checkpoint."""
        parts = {
            "sparse": ("sparse",),
            "lowrank": ("lowrank", self.format),
            "lowrank-sparse": ("lowrank-sparse", self.format, self.mode, f"{self.init}-start"),
        }[self.method]
        return "_".join((*parts, f"{self.storage:g}", f"seed{self.seed}"))

    def options(self) -> dict[str, Any]:
        """Arguments of ``recipes.lowrank_sparse``."""
        found: dict[str, Any] = {"method": self.method, "storage": self.storage, "fraction": FRACTION}
        if self.method != "sparse":
            found["low_rank"] = FORMATS[self.format]
        if self.method == "lowrank-sparse":
            found |= {"mode": self.mode, "init": self.init}
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _sparse(storage: float, seed: int) -> Run:
    return Run("sparse", "none", "none", "none", storage, seed)


def _lowrank(name: str, storage: float, seed: int) -> Run:
    return Run("lowrank", name, "none", "none", storage, seed)


def _both(name: str, storage: float, seed: int, mode: str = "additive", init: str = "residual") -> Run:
    return Run("lowrank-sparse", name, mode, init, storage, seed)


def runs_of(
    sizes: Sequence[float],
    formats: Sequence[str],
    seeds: Sequence[int],
    masked: Sequence[str],
) -> list[Run]:
    """Rows in order of weight, so that a run cut short compares all ways at one size at least.

    The middle size first: all ways, then pruning, decomposition and their sum in the last format under the
    other seeds, then the other start. After that the other sizes, and these under the other seeds.
    """
    middle, (first, *others), last = sizes[len(sizes) // 2], seeds, formats[-1]
    rest = [size for size in sizes if size != middle]
    starts = [(name, mode) for name in masked if name in formats for mode in ("additive", "masking")]
    found = [
        *_ways(formats, middle, first),
        *(run for seed in others for run in _three(last, middle, seed)),
        *(_both(name, middle, first, mode, "masking") for name, mode in starts),
    ]
    for storage in rest:
        found += _ways(formats, storage, first)
    return [*found, *(run for size in rest for seed in others for run in _three(last, size, seed))]


def _ways(formats: Sequence[str], storage: float, seed: int) -> list[Run]:
    """All ways at one size, those that matter most first."""
    found = [_sparse(storage, seed)]
    for name in reversed(formats):
        found += [_both(name, storage, seed), _lowrank(name, storage, seed)]
    return [*found, *(_both(name, storage, seed, "masking") for name in reversed(formats))]


def _three(name: str, storage: float, seed: int) -> tuple[Run, Run, Run]:
    return _sparse(storage, seed), _both(name, storage, seed), _lowrank(name, storage, seed)


def images_of(network: Network, folder: Path) -> tuple[Dataset, Dataset]:
    """The whole set, and one whose "test" images are training images held out.

    The second one's training images are the first ``images`` of a fixed random order without those.
    """
    whole = data.load(network.dataset, folder)
    count = len(whole.train_labels)
    if network.images + network.held_out > count:
        raise ValueError(
            f"{network.dataset}: images and held_out must be at most {count} together, got "
            f"{network.images} and {network.held_out}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, rest = order.split([network.held_out, count - network.held_out])
    return whole, part(whole, rest[: network.images], held)


def part(whole: Dataset, training: torch.Tensor, held: torch.Tensor) -> Dataset:
    """Training images of ``whole`` by number, to train on and to test with."""
    return Dataset(
        name=whole.name,
        train_images=whole.train_images[training],
        train_labels=whole.train_labels[training],
        test_images=whole.train_images[held],
        test_labels=whole.train_labels[held],
        mean=whole.mean,
        std=whole.std,
        classes=whole.classes,
    )


def dense_network(
    network: Network, whole: Dataset, folder: Path, work: Path, dense: Mapping[str, Any]
) -> tuple[nn.Module, Dataset, str]:
    """The trained network, ``whole`` with the normalisation it was trained with, and where it is from.

    Without published weights it is trained here on all images but those held out; the checkpoint under
    ``work`` keeps that for the next time.
    """
    if network.weights is not None:
        model = models.build(network.name).eval()
        normalization = models.load_weights(model, folder / network.weights)
        whole = whole if normalization is None else whole.with_normalization(*normalization)
        return model, whole, network.weights
    with torch.random.fork_rng([]):
        torch.manual_seed(dense["seed"])
        model = models.build(network.name)
    order = torch.randperm(len(whole.train_labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, rest = order[: network.held_out], order[network.held_out :]
    train(
        model,
        part(whole, rest, held),
        epochs=dense["epochs"],
        lr=dense["lr"],
        seed=dense["seed"],
        batch_size=network.batch_size,
        channels_last=True,
        checkpoint=work / "dense.ckpt",
    )
    text = f"{dense['epochs']} epochs of {len(rest):,} images, lr {dense['lr']}, seed {dense['seed']}"
    return model.eval(), whole, f"trained here: {text}"
