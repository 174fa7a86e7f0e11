"""Where a method attaches to the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensorcomp_ext.data import Dataset


@dataclass
class TrainState:
    """What the loop shows to callbacks and to progress functions.

    Attributes:
        model, optimizer, dataset: as given or built.
        epoch, step: running epoch and optimiser step over the whole run, both from 0.
        epochs, steps: their totals.
        images, labels, outputs: the current batch: normalised images, labels, logits.
        loss: the current batch's loss, detached; reading it synchronises an accelerator.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    epochs: int
    steps: int
    epoch: int = 0
    step: int = 0
    images: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    loss: torch.Tensor | None = None


class Callback:
    """Base of training methods: every point does nothing unless overridden.

    The loop calls, in this order: `on_start` once; per batch `on_loss` (its return value is what is
        differentiated)
    and, after the optimiser's step, `on_step`; per epoch `on_epoch`, before the checkpoint is written. State
    that must survive a resume goes through `state_dict` (tensors, numbers, strings, lists and dicts of them).
    """

    def on_start(self, state: TrainState) -> None:
        """Before the first batch, after a checkpoint has been loaded."""

    def on_loss(self, state: TrainState, loss: torch.Tensor) -> torch.Tensor:
        """The loss to differentiate, given the batch's cross-entropy."""
        return loss

    def on_step(self, state: TrainState) -> None:
        """After the optimiser's step."""

    def on_epoch(self, state: TrainState) -> None:
        """After the last batch of an epoch."""

    def settings(self) -> dict[str, Any]:
        """What decides the result of a run with this callback, in JSON types; resumed only under the same."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
