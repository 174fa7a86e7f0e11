"""One option for every layer, the least total loss within a budget of time: a multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]

POINTS = 20_000
"""Partial sums kept; below it the solution is exact."""


class Solution(NamedTuple):
    """The option chosen of each table, the sum of their losses and of their costs."""

    chosen: tuple[int, ...]
    loss: float
    cost: float


def knapsack(
    tables: Sequence[Sequence[tuple[float, float]]], budget: float, points: int = POINTS
) -> Solution | None:
    """One (cost, loss) of every table with the least Σ loss under Σ cost ≤ budget; None where nothing fits.

    Tables are merged one after another and only sums that no other undercuts in both are kept, which is
    exact; of equal losses the cheaper, of equal pairs the earlier option wins. Where more than `points` sums
    remain, costs are cut into as many equal slices and the least loss of each is kept: never over the budget,
    off the optimum by at most what a slice of it a table could save. Cost: Σ_k points · |table_k| · log.

    Raises ValueError for an empty table or a number that is not finite.
    """
    for place, table in enumerate(tables):
        if not table or not all(math.isfinite(value) for pair in table for value in pair):
            raise ValueError(
                f"knapsack: table {place} must hold finite (cost, loss) pairs, got {list(table)}"
            )
    cheapest = [min(cost for cost, _ in table) for table in tables]
    later = float(sum(cheapest))
    costs: _Array = np.zeros(1)
    losses: _Array = np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for table, least in zip(tables, cheapest, strict=True):
        later -= least
        pairs = np.asarray(table, dtype=np.float64)
        sums = (costs[:, None] + pairs[None, :, 0]).ravel()
        total = (losses[:, None] + pairs[None, :, 1]).ravel()
        # What the remaining tables cost at least must still fit; the tolerance is of the rounding of sums.
        fitting = np.flatnonzero(sums + later <= budget + 1e-12 * abs(budget))
        if not fitting.size:
            return None
        kept = _front(sums, total, fitting, points)
        trail.append((kept // len(table), kept % len(table)))
        costs, losses = sums[kept], total[kept]
    if not tables:
        return Solution((), 0.0, 0.0) if budget >= 0 else None
    place = int(losses.size - 1)  # along a front losses fall as costs rise
    chosen: list[int] = []
    loss, cost = float(losses[place]), float(costs[place])
    for before, option in reversed(trail):
        chosen.append(int(option[place]))
        place = int(before[place])
    return Solution(tuple(reversed(chosen)), loss, cost)


def _front(costs: _Array, losses: _Array, fitting: NDArray[np.int64], points: int) -> NDArray[np.int64]:
    """Indices of the sums that none undercuts, by rising cost; at most about `points` of them."""
    order = fitting[np.lexsort((fitting, losses[fitting], costs[fitting]))]
    falling = losses[order]
    best = np.minimum.accumulate(falling)
    first = np.concatenate(([True], falling[1:] < best[:-1]))
    front = order[first]
    if front.size <= points:
        return front
    low, high = costs[front[0]], costs[front[-1]]
    slices = np.minimum(((costs[front] - low) / (high - low) * points).astype(np.int64), points - 1)
    last = np.concatenate((slices[1:] != slices[:-1], [True]))  # the least loss of a slice is its last
    last[0] = True  # the cheapest stays: what fits must not be lost
    return front[last]
