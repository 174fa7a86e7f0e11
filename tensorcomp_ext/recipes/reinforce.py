"""l0 rank selection with gates that are 0 or 1, trained by the score of what was drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tensorcomp_ext.data import Dataset
from tensorcomp_ext.ranks.bernoulli_gates import BernoulliGate

from .callbacks import Callback, TrainState
from .gated import GatedNetwork, RankSelection
from .options import check_number
from .result import RecipeResult
from .selection import Run, select
from .task import Task


class Reinforce(RankSelection):
    """The surrogate ``(1/M) sum_m [log P(Z_m) c_m + J_m]``, ``c_m`` the value of ``J_m + weight |Z_m|_0``.

    Its gradient is an unbiased estimate of that of ``E[J + weight |Z|_0]``: in the weights through the
    losses ``J_m``, in the gates through the scores. There is no baseline, so that c, of which the count is by
    far the most, makes the noise.

    Args:
        network: with :class:`..ranks.bernoulli_gates.BernoulliGate`.
        weight: of the number of open gates.
        samples: M; each takes a forward and a backward pass.
        options: of :class:`.RankSelection`.

    Raises:
        ValueError: a weight below 0, samples below 1, another distribution.
    """

    def __init__(
        self, network: GatedNetwork, *, weight: float = 0.2, samples: int = 5, **options: Any
    ) -> None:
        check_samples("Reinforce", weight, samples)
        gate = network.gate
        if not isinstance(gate, BernoulliGate):
            raise ValueError(f"Reinforce: gates must be of BernoulliGate, got {type(gate).__name__}")
        super().__init__(network, **options)
        self.gate, self.weight, self.samples = gate, weight, samples

    def on_batch(self, state: TrainState) -> None:
        for gates in self.network.gates:
            gates.drawn = []

    def on_loss(self, state: TrainState, loss: Tensor) -> Tensor:
        if self.network.frozen:
            return loss
        total, outputs = self._surrogate(loss), state.outputs
        for _ in range(self.samples - 1):
            total = total + self._surrogate(state.forward())
        state.outputs = outputs
        return total / self.samples

    def _surrogate(self, loss: Tensor) -> Tensor:
        """The term of the gates that the last forward pass drew.

        Of a layer that it called several times all draws are scored, and their mean is counted. Of one that
        it did not call, the loss does not depend: its count has an expectation with an exact gradient.
        """
        score = expected = loss.new_zeros(())
        cost = loss.detach()
        for gates in self.network.gates:
            if not gates.drawn:
                expected = expected + self.gate.probability(gates.location).sum()
                continue
            drawn, gates.drawn = torch.stack(gates.drawn), []
            score = score + self.gate.log_probability(gates.location, drawn).sum()
            cost = cost + self.weight * (drawn.sum() / len(drawn))
        return score * cost + self.weight * expected + loss

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """The expected number of open gates."""
        terms = [self.gate.probability(gates.location).sum() for gates in self.network.gates]
        return torch.stack(terms).sum()


def check_samples(name: str, weight: float, samples: int) -> None:
    """ValueError for what cannot be, naming it."""
    check_number(name, "weight", weight, 0.0, math.inf, "[0, inf)")
    if type(samples) is not int or samples < 1:
        raise ValueError(f"{name}: samples must be an int >= 1, got {samples!r}")


def reinforce(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    rank: Any = 25,
    format: Any = None,
    preset: str | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    start: str = "random",
    weight: float = 0.2,
    samples: int = 5,
    target: float | None = None,
    gate_lr: float = 1.0,
    remove_below: float = 0.0,
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
    """Train a factorised network with gates that are 0 or 1, by the REINFORCE estimate of their gradient.

    Gates are Bernoulli with ``pi = clamp(mu, 0, 1)``, mu being about 0.55 at first; of each rank one entry
    has none. The expectation of ``CE + weight (number of open gates)`` is minimised. In the end pi is
    rounded. Noisier and less accurate than :func:`.l0`: it is there to be compared with.

    Args:
        weight: of the number of open gates.
        samples: of all gates a step, each with a forward and a backward pass.
        remove_below: as in :func:`.l0`. A gate with ``pi = 0`` has no gradient, and comes back by what
            momentum is left at most.
        model, dataset, rank, format, preset, layers, exclude, start, target, gate_lr, remove_every,
            example_inputs, epochs, lr, optimizer, schedule, weight_decay, seed, callbacks, training: as
            :func:`.l0` takes them.

    Raises:
        ValueError, TypeError: options that do not fit, before any work; and as ``train`` and ``compress``.

    Source: the supplement to "Learning Low-Rank Tensor Cores with Probabilistic l0-Regularized Rank Selection
    for Model Compression", section 2; Williams 1992.
    """
    run = Run(
        name="reinforce",
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
    check_samples("reinforce", weight, samples)
    options = {"weight": weight, "samples": samples}
    training |= {"epochs": epochs, "optimizer": optimizer, "schedule": schedule}
    return select(run, model, dataset, BernoulliGate(), Reinforce, options, training)
