"""What goes into a training run and what its history records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import nn

from .evaluate import Accuracy

OPTIMIZERS = ("sgd", "adam", "adamw")
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class Epoch:
    """One line of a training history.

    Attributes:
        epoch: from 1.
        loss: mean over the epoch's batches of what was differentiated.
        train: correct answers on the (augmented) training examples as they passed, in training mode.
        test: accuracy on the test examples after the epoch, or None where not asked for.
        lr: learning rate of the last step.
        seconds: wall time of the epoch's training.
        extra: figures of the methods at work, and of the test examples, by name.
    """

    epoch: int
    loss: float
    train: Accuracy
    test: Accuracy | None
    lr: float
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON and checkpoints."""
        test = None if self.test is None else list(self.test)
        return {**asdict(self), "train": list(self.train), "test": test}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Epoch:
        """The inverse of `to_dict`."""
        test = None if entry["test"] is None else Accuracy(*entry["test"])
        return cls(**{**entry, "train": Accuracy(*entry["train"]), "test": test})


class TrainResult(NamedTuple):
    """The trained model (the one given) and its history, resumed epochs included."""

    model: nn.Module
    history: list[Epoch]


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; a checkpoint resumes only under the same."""

    task: dict[str, Any]
    examples: int
    epochs: int
    lr: float
    batch_size: int
    momentum: float
    weight_decay: float
    schedule: str
    optimizer: str
    seed: int
    callbacks: list[dict[str, Any]]
    precision: str = "float32"
    accumulate: int = 1
    warmup: int = 0
    processes: int = 1
    parameters: list[dict[str, Any]] | None = None

    def recorded(self) -> dict[str, Any]:
        """As a checkpoint keeps them: those of the task beside the others."""
        own = {
            key: float(value) if isinstance(value, float) else value  # numpy's floats are no plain ones
            for key, value in asdict(self).items()
            if key not in ("task", "examples")
        }
        return {**self.task, **own}

    @staticmethod
    def completed(content: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a checkpoint's content; of what older ones do not say those ``wanted`` are taken."""
        older = {"optimizer": "sgd", "precision": "float32", "accumulate": 1, "warmup": 0, "processes": 1}
        untold = {**wanted, **content.get("normalization", {})}
        untold = {key: untold[key] for key in ("mean", "std", "fingerprint", "parameters") if key in wanted}
        return {**older, **untold, **content["settings"]}
