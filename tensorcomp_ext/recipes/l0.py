"""l0 rank selection: Gaussian gates on all ranks, and a penalty on how many are open."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensorcomp_ext.data import Dataset
from tensorcomp_ext.ranks.gaussian_gates import GaussianGate

from .callbacks import Callback, TrainState
from .gated import GatedNetwork, RankSelection
from .options import check_choice, check_number
from .result import RecipeResult
from .selection import Run, select
from .task import Task

Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")


class L0(RankSelection):
    """Adds ``weight sum_ranks mean_j P(z_j > 0)`` to the loss, until ranks are frozen.

    Args:
        network: with :class:`..ranks.gaussian_gates.GaussianGate`.
        weight: of the penalty.
        reduction: "mean" over the gates that each rank began with, or their "sum".
        options: of :class:`.RankSelection`.

    Raises:
        ValueError: another reduction, a weight below 0.
    """

    def __init__(
        self, network: GatedNetwork, *, weight: float = 1.0, reduction: Reduction = "mean", **options: Any
    ) -> None:
        check_penalty("L0", weight, reduction)
        super().__init__(network, **options)
        self.weight, self.reduction = weight, reduction

    def penalty(self) -> Tensor:
        """The expected number of open gates, by ``reduction``, without its weight."""
        gate, terms = self.network.gate, []
        for gates in self.network.gates:
            chances = gate.probability(gates.location)
            terms.append(chances.dot(gates.shares) if self.reduction == "mean" else chances.sum())
        return torch.stack(terms).sum()

    def on_loss(self, state: TrainState, loss: Tensor) -> Tensor:
        return loss if self.network.frozen else loss + self.weight * self.penalty()


def check_penalty(name: str, weight: float, reduction: str) -> None:
    """ValueError for what cannot be, naming it."""
    check_number(name, "weight", weight, 0.0, math.inf, "[0, inf)")
    check_choice(name, "reduction", reduction, REDUCTIONS)


def check_sigma(name: str, sigma: float) -> None:
    """ValueError or TypeError for what cannot be, naming it."""
    check_number(name, "sigma", sigma, 0.0, math.inf, "(0, inf)")


def l0(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    rank: Any = 25,
    format: Any = None,
    preset: str | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    start: str = "random",
    weight: float = 1.0,
    sigma: float = 0.5,
    reduction: Reduction = "mean",
    target: float | None = None,
    gate_lr: float = 1.0,
    remove_below: float = 0.05,
    remove_every: int = 0,
    example_inputs: Any = None,
    epochs: int = 150,
    lr: float = 5e-4,
    optimizer: str = "adam",
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    seed: int = 0,
    callbacks: Iterable[Callback] = (),
    **training: Any,
) -> RecipeResult:
    """Train a factorised network with gates on its ranks, so that those it can do without fall.

    Gates ``z = clamp(mu + 1.2 + sigma eps, 0, 1)`` stand between neighbouring factors; of each rank one entry
    has none. The loss is ``CE + weight sum_ranks mean_j Phi((mu_j + 1.2) / sigma)``. In the end a rank is the
    number of gates with ``mu + 1.2 > 0``, and gates are multiplied into the factors.

    Args:
        model: dense; it is not changed.
        dataset: to train on.
        rank: to begin with, as ``compress`` takes it.
        format, layers, exclude, example_inputs: as ``compress`` takes them.
        preset: instead of ``format`` and ``layers`` a published layout, see :func:`.presets.layout`.
        start: "random": factors are drawn, biases are 0, and what is not factorised begins as it is, as do
            layers whose weights do not require gradients; or "decompose": of the trained weights.
        weight: of the penalty. The published ones are 0.1 to 1.5, for the mean.
        sigma: standard deviation of the noise; below 0.5 ranks hardly fall, above 0.6 accuracy does.
        reduction: of a rank's gates in the penalty, "mean" or "sum".
        target: ratio of all parameters, dense to stored, at which ranks are frozen: from then on there is
            neither noise nor penalty. None: ranks are free to the end.
        gate_lr: learning rate of mu over that of the weights. With Adam mu moves by at most its rate a step
            and has 1.2 to go; with few steps take 5 to 10.
        remove_below: entries whose gates open with at most this probability are cut during training.
        remove_every: steps after which that is looked at, beside the end of each epoch; 0 for epochs alone.
        epochs, lr, optimizer, schedule, weight_decay, seed, callbacks, training: as :func:`.train` takes
            them; mu is never decayed. The seed is also that of factors and gates. With ``checkpoint`` a
            killed run goes on where it was.

    Raises:
        ValueError, TypeError: options that do not fit, before any work; and as ``train`` and ``compress``.

    Source: the supplement to "Learning Low-Rank Tensor Cores with Probabilistic l0-Regularized Rank Selection
    for Model Compression"; Yamada et al. 2020 (gates).
    """
    run = Run(
        name="l0",
        rank=rank,
        format=format,
        preset=preset,
        layers=layers,
        exclude=exclude,
        start=start,
        remove_below=remove_below,
        remove_every=remove_every,
        target=target,
        gate_lr=gate_lr,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        example_inputs=example_inputs,
        callbacks=callbacks,
    )
    check_penalty("l0", weight, reduction)
    check_sigma("l0", sigma)
    options = {"weight": weight, "reduction": reduction}
    training |= {"epochs": epochs, "optimizer": optimizer, "schedule": schedule}
    return select(run, model, dataset, GaussianGate(sigma), L0, options, training)
