"""What goes into a training run and what its history records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import nn

from tensorcomp_ext.data import Dataset

from .evaluate import Accuracy
from .schedule import SCHEDULES

OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Epoch:
    """One line of a training history.

    Attributes:
        epoch: from 1.
        loss: mean over the epoch's batches of what was differentiated.
        train: correct answers on the (augmented) training images as they passed, in training mode.
        test: accuracy on the test images after the epoch, or None where not asked for.
        lr: learning rate of the last step.
        seconds: wall time of the epoch's training.
    """

    epoch: int
    loss: float
    train: Accuracy
    test: Accuracy | None
    lr: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON and checkpoints."""
        test = None if self.test is None else list(self.test)
        return {**asdict(self), "train": list(self.train), "test": test}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Epoch:
        """The inverse of `to_dict`."""
        test = None if entry["test"] is None else Accuracy(*entry["test"])
        return cls(**{**entry, "train": Accuracy(*entry["train"]), "test": test})


def check_run(name: str, dataset: Any, epochs: Any) -> None:
    """TypeError for another object than a ``Dataset``, and for epochs that are no int."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name}: dataset must be a tensorcomp_ext.data.Dataset, as tensorcomp_ext.data.load gives it, "
            f"got {type(dataset).__name__}"
        )
    if not isinstance(epochs, int) or isinstance(epochs, bool):
        raise TypeError(f"{name}: epochs must be an int, got {epochs!r}")


class TrainResult(NamedTuple):
    """The trained model (the one given) and its history, resumed epochs included."""

    model: nn.Module
    history: list[Epoch]


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; a checkpoint resumes only under the same."""

    dataset: str
    images: int
    epochs: int
    lr: float
    batch_size: int
    momentum: float
    weight_decay: float
    schedule: str
    optimizer: str
    augment: bool
    label_smoothing: float
    seed: int
    channels_last: bool
    callbacks: list[dict[str, Any]]

    def check(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"train: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"train: optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        if self.images < 1:
            raise ValueError(f"train: {self.dataset} has no training images")
        for name, value, low, high in (
            ("epochs", self.epochs, 0, math.inf),
            ("batch_size", self.batch_size, 1, math.inf),
            ("lr", self.lr, 0, math.inf),
            ("momentum", self.momentum, 0, 1),
            ("weight_decay", self.weight_decay, 0, math.inf),
            ("label_smoothing", self.label_smoothing, 0, 1),
        ):
            if not low <= value <= high or math.isinf(value):
                raise ValueError(f"train: {name} must be finite and in [{low}, {high}], got {value}")
