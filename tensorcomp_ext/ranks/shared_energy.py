"""Ranks of many layers under one budget: one energy threshold for all, bisected, then single ranks grown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from .budgets import grow
from .layouts import RankLayout, Ranks

STEPS = 60


@dataclass
class Subject:
    """A layer that competes for the budget; costs in whatever unit the budget has.

    Attributes:
        dense_cost: ranks that cost as much leave the layer dense.
        ceiling: of a layer that is not to be dense: all its ranks cost less, whatever the threshold.
    """

    layout: RankLayout
    cost: Callable[[Ranks], float]
    dense_cost: float = math.inf
    ceiling: float = math.inf

    @cached_property
    def kept(self) -> list[Tensor]:
        """For every rank the share of energy that its unfolding keeps at rank 0, 1, 2, …"""
        return [kept_energy(spectrum.values) for spectrum in self.layout.spectra()]

    def at(self, p: float) -> Ranks | None:
        """The smallest ranks that keep a share p; None, dense, where these save nothing.

        Under the ceiling: those of the largest share that stays below it, and of rank 1 where none does.
        """
        ranks = self._keeping(p)
        if self.cost(ranks) >= self.ceiling:
            ranks = self._highest
        return ranks if self.cost(ranks) < self.dense_cost else None

    def _keeping(self, p: float) -> Ranks:
        return tuple(
            min(max(1, int((kept[1:] < p * (1 - 1e-15)).sum()) + 1), limit)
            for kept, limit in zip(self.kept, self.layout.limits, strict=True)
        )

    @cached_property
    def _highest(self) -> Ranks:
        """Ranks at the largest share whose cost is below the ceiling."""
        low, high, best = 0.0, 1.0, self._keeping(0.0)
        for _ in range(STEPS):
            middle = (low + high) / 2
            ranks = self._keeping(middle)
            if self.cost(ranks) < self.ceiling:
                low, best = middle, ranks
            else:
                high = middle
        return best

    def price(self, ranks: Ranks | None) -> float:
        return self.dense_cost if ranks is None else self.cost(ranks)

    def loss(self, ranks: Ranks | None) -> float:
        """Σ_n of the discarded shares: at least the squared relative error of a higher-order SVD."""
        if ranks is None:
            return 0.0
        return sum(1.0 - float(kept[rank]) for kept, rank in zip(self.kept, ranks, strict=True))


class SharedEnergy(NamedTuple):
    """Ranks by layer (None: dense), the threshold before single ranks grew, and the cost."""

    ranks: dict[str, Ranks | None]
    p: float
    cost: float


def kept_energy(values: Tensor) -> Tensor:
    """Shares of Σσ² that the leading 0, 1, 2, … singular values hold."""
    kept = values.new_zeros(values.numel() + 1)
    if values.numel() and float(values[0]) > 0.0:
        kept[1:] = (values / values[0]).square().cumsum(0)
        kept /= float(kept[-1])
    else:
        kept[1:] = 1.0
    return kept


def share_energy(subjects: Mapping[str, Subject], budget: float) -> SharedEnergy | None:
    """Ranks of all layers at the largest shared energy threshold p whose total cost is within the budget.

    R_n = min{r : Σ_{i≤r} σ_i² ≥ p Σσ²} for every unfolding of every layer; one that would cost as much as the
    dense layer stays dense. p is bisected; what it leaves is spent on single ranks, the largest gain of
    Σ_n kept share a unit of cost first, until none fits. None where rank 1 everywhere exceeds the budget.
    Raises ValueError for a layer whose format has no spectra.
    """

    def total(ranks: Mapping[str, Ranks | None]) -> float:
        return sum(subjects[name].price(chosen) for name, chosen in ranks.items())

    def at(p: float) -> dict[str, Ranks | None]:
        return {name: subject.at(p) for name, subject in subjects.items()}

    low, high, best = 0.0, 1.0, at(0.0)
    if total(best) > budget:
        return None
    top = at(1.0)
    if total(top) <= budget:
        return SharedEnergy(top, 1.0, total(top))
    for _ in range(STEPS):
        middle = (low + high) / 2
        ranks = at(middle)
        if total(ranks) <= budget:
            low, best = middle, ranks
        else:
            high = middle
    _fill(subjects, best, budget - total(best))
    return SharedEnergy(best, low, total(best))


def _steps(subject: Subject, ranks: Ranks | None) -> Sequence[tuple[float, float, Ranks | None]]:
    """What one more of each rank gains, what it costs, and the ranks then; dense where it costs as much."""
    if ranks is None:
        return []
    price, loss = subject.price(ranks), subject.loss(ranks)
    found: list[tuple[float, float, Ranks | None]] = [(loss, subject.dense_cost - price, None)]
    for place in range(len(ranks)):
        grown = grow(subject.layout, ranks, place)
        if grown is not None and subject.cost(grown) < min(subject.dense_cost, subject.ceiling):
            found.append((loss - subject.loss(grown), subject.cost(grown) - price, grown))
    return found


def _fill(subjects: Mapping[str, Subject], ranks: dict[str, Ranks | None], left: float) -> None:
    """Spend what is left of a budget on single steps, the best gain for its cost first; ties in order."""
    steps = {name: _steps(subject, ranks[name]) for name, subject in subjects.items()}
    while True:
        best: tuple[float, str, float, Ranks | None] | None = None
        for name, offered in steps.items():
            for gain, cost, grown in offered:
                value = gain / cost if cost > 0 else math.inf
                if cost <= left and gain > 0 and (best is None or value > best[0]):
                    best = (value, name, cost, grown)
        if best is None:
            return
        _, name, cost, ranks[name] = best
        left -= cost
        steps[name] = _steps(subjects[name], ranks[name])
