"""Where a method attaches to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .task import Task


@dataclass
class TrainState:
    """What the loop shows to callbacks and to progress functions.

    Attributes:
        model, optimizer, task: as given or built; of several processes each has its own.
        epoch, step: running epoch and optimiser step over the whole run, both from 0.
        epochs, steps: their totals.
        inputs, labels, outputs: the current batch: what the network was called with, targets, answers.
        loss: the current batch's loss, detached; reading it synchronises an accelerator.
        changed: whether parameters were exchanged since the loop last looked; see :meth:`networks_changed`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task
    epochs: int
    steps: int
    epoch: int = 0
    step: int = 0
    inputs: tuple[Tensor, ...] = ()
    labels: Tensor | None = None
    outputs: Tensor | None = None
    loss: Tensor | None = None
    changed: bool = False
    call: Callable[..., Tensor] | None = field(default=None, repr=False)
    """What runs the network: itself, or of several processes what also averages gradients."""
    precision: str = "float32"

    def forward(self) -> Tensor:
        """Call the network with the current batch: its answers into :attr:`outputs`, its mean loss back.

        The loop does so once a step; a method that draws several samples a step calls it again.
        """
        assert self.labels is not None
        device = self.labels.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            self.outputs = (self.call or self.model)(*self.inputs)
            return self.task.loss(self.outputs, self.labels)

    def networks_changed(self) -> None:
        """Say that parameters were exchanged, cut or removed, so that what depends on them is made anew."""
        self.changed = True


class Callback:
    """Base of training methods: every point does nothing unless overridden.

    The loop calls, in this order: `on_start` once; per batch `on_batch`, `on_loss` (its return value is what
    is differentiated) and, after the optimiser's step, `on_step`; per epoch `on_epoch`, after the test images
    were evaluated, `log`, and then the checkpoint is written. State that must survive a resume goes through
    `state_dict` (tensors, numbers, strings, lists and dicts of them). With gradient accumulation `on_batch`
    and `on_loss` are called for every part of a batch.
    """

    def on_start(self, state: TrainState) -> None:
        """Before the first batch, after a checkpoint has been loaded."""

    def on_batch(self, state: TrainState) -> None:
        """Before the network is called with a batch."""

    def on_loss(self, state: TrainState, loss: Tensor) -> Tensor:
        """The loss to differentiate, given the batch's own."""
        return loss

    def on_step(self, state: TrainState) -> None:
        """After the optimiser's step."""

    def on_epoch(self, state: TrainState) -> None:
        """After the last batch of an epoch."""

    def log(self) -> dict[str, Any]:
        """Figures of the epoch just ended for its line in the history, in JSON types."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What decides the result of a run with this callback, in JSON types; resumed only under the same."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {}

    def reshape(self, state: TrainState, saved: Mapping[str, Any]) -> None:
        """Before weights are loaded from a checkpoint: give network and optimiser the shapes they had then.

        Args:
            saved: what :meth:`state_dict` returned.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
