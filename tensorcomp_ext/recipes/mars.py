"""MARS: ranks selected by a prior on masks of the cores, relaxed to the hard concrete distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tensorcomp_ext.data import Dataset
from tensorcomp_ext.ranks.concrete_gates import ConcreteGate

from .callbacks import Callback, TrainState
from .gated import GatedNetwork, RankSelection
from .options import check_choice, check_number
from .result import RecipeResult
from .selection import Run, select
from .task import Task

STRENGTHS = {"soft": (0.1, -1.5), "hard": (0.01, -1.75)}
"""Prior probability of an open gate, and the first logits."""
_PRECISION = 0.1**2
_FIRST, _FALL, _LEAST = 0.1, 0.99, 0.01


class Mars(RankSelection):
    """The loss ``CE - (1/N) [sum (phi ln p + (1 - phi) ln(1 - p)) - 0.005 |cores|^2]``.

    N training examples, ``phi = sigmoid(logit)``, p the prior probability of an open gate. The temperature
    begins at 0.1 and is multiplied by 0.99 after each epoch, down to 0.01.

    Args:
        network: with :class:`..ranks.concrete_gates.ConcreteGate`.
        prior: p.
        options: of :class:`.RankSelection`.

    Raises:
        ValueError: a prior outside of (0, 1), another distribution.
    """

    def __init__(self, network: GatedNetwork, *, prior: float = 0.1, **options: Any) -> None:
        check_prior("Mars", prior)
        gate = network.gate
        if not isinstance(gate, ConcreteGate):
            raise ValueError(f"Mars: gates must be of ConcreteGate, got {type(gate).__name__}")
        super().__init__(network, **options)
        self.gate, self.prior = gate, prior

    @staticmethod
    def temperature(epoch: int) -> float:
        """That of an epoch, from 0."""
        return max(_LEAST, _FIRST * _FALL**epoch)

    def on_batch(self, state: TrainState) -> None:
        self.gate.temperature = self.temperature(state.epoch)

    def penalty(self) -> Tensor:
        """What the prior adds to the loss of all examples: minus the logarithm of its density."""
        gates = [self.gate.log_prior(each.location, self.prior).sum() for each in self.network.gates]
        layers = self.network.layers.values()
        cores = [factor.float().square().sum() for layer in layers for factor in layer.weight.factors]
        return 0.5 * _PRECISION * torch.stack(cores).sum() - torch.stack(gates).sum()

    def on_loss(self, state: TrainState, loss: Tensor) -> Tensor:
        return loss if self.network.frozen else loss + self.penalty() / state.task.size


def check_prior(name: str, prior: float) -> None:
    """ValueError for what cannot be, naming it."""
    check_number(name, "prior", prior, 0.0, 1.0, "(0, 1)")


def check_masks(
    name: str,
    strength: str,
    prior: float | None,
    logit: float | None,
    target: float | None,
    remove_below: float,
) -> tuple[float, float]:
    """Prior and first logits that these options of :func:`mars` mean.

    Raises:
        ValueError, TypeError: for what cannot be, naming it.
    """
    check_choice(name, "strength", strength, STRENGTHS)
    usual, first = STRENGTHS[strength]
    prior, logit = (usual if prior is None else prior), (first if logit is None else logit)
    check_prior(name, prior)
    check_number(name, "logit", logit, -math.inf, math.inf, "(-inf, inf)")
    check_number(name, "remove_below", remove_below, 0.0, 1.0, "[0, 1)")
    if target is not None and logit <= 0.0 and remove_below == 0.0:
        raise ValueError(
            f"{name}: remove_below must be above 0 for a target where first logits are {logit}, got "
            f"{remove_below}: masks that begin shut count once they are cut"
        )
    return prior, logit


def mars(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    rank: Any = 20,
    format: Any = None,
    preset: str | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    start: str = "random",
    strength: str = "soft",
    prior: float | None = None,
    logit: float | None = None,
    target: float | None = None,
    gate_lr: float = 1.0,
    remove_below: float = 0.02,
    remove_every: int = 0,
    example_inputs: Any = None,
    epochs: int = 300,
    lr: float = 1e-2,
    optimizer: str = "adam",
    schedule: str = "decay",
    weight_decay: float = 0.0,
    seed: int = 0,
    callbacks: Iterable[Callback] = (),
    **training: Any,
) -> RecipeResult:
    """Train a factorised network with masks on its ranks, which a prior would rather have shut.

    Masks are of the hard concrete distribution, the cores have a Gaussian prior; what is minimised is minus
    the relaxed logarithm of the posterior over the examples. In the end entries with a logit above 0 stay,
    of each rank at least the likeliest.

    Args:
        strength: of the prior: "soft", 0.1 for an open mask and first logits -1.5, or "hard", 0.01 and -1.75.
        prior, logit: other values than those of ``strength``.
        schedule: as :func:`.train` takes it; the published one, 0.99 an epoch, falls to 0.05 in 300 epochs,
            "decay" to 0.04 in any number.
        remove_below: as in :func:`.l0`, lower since masks that matter begin at 0.15 here.
        target: as in :func:`.l0`. First logits of 0 or less have all masks shut: then the ratio is that of
            what has been cut, which never takes more than the target asks for, so that it needs a
            ``remove_below`` above 0; the masks that are left are opened. None: ranks are free to the end.
        model, dataset, rank, format, preset, layers, exclude, start, gate_lr, remove_every,
            example_inputs, epochs, lr, optimizer, weight_decay, seed, callbacks, training: as :func:`.l0`
            takes them.

    Raises:
        ValueError, TypeError: options that do not fit, before any work; and as ``train`` and ``compress``.

    Source: Kodryan et al. 2023 (MARS), and its public code.
    """
    run = Run(
        name="mars",
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
    prior, logit = check_masks("mars", strength, prior, logit, target, remove_below)
    gate = ConcreteGate(logit, temperature=Mars.temperature(0))
    training |= {"epochs": epochs, "optimizer": optimizer, "schedule": schedule}
    return select(run, model, dataset, gate, Mars, {"prior": prior}, training)
