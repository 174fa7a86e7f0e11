"""The largest ranks of one weight whose cost fits a budget."""

from __future__ import annotations

from collections.abc import Callable

from tensorcomp_ext._warnings import warn

from .layouts import RankLayout, Ranks


def largest_within(layout: RankLayout, cost: Callable[[Ranks], float], budget: float, label: str) -> Ranks:
    """Ranks at the largest common fraction of the limits whose cost fits, then grown one by one.

    The common fraction moves all ranks at once and leaves up to a step of all of them unused, a third of the
    budget of small layers; `filled` gives it to single ranks. Rank 1, with a warning, if even that does not
    fit.
    """
    floor, top = layout.scaled(0.0), layout.scaled(1.0)
    if cost(floor) > budget:
        warn(
            f"{label} cannot be met for {layout.format} of shape {list(layout.shape)}: rank 1 already needs "
            f"{cost(floor):.0f} of {budget:.0f}; using rank 1",
        )
        return floor
    if cost(top) <= budget:
        return top
    low, high, best = 0.0, 1.0, floor
    while high - low > 1e-12:
        middle = (low + high) / 2
        ranks = layout.scaled(middle)
        if cost(ranks) <= budget:
            low, best = middle, ranks
        else:
            high = middle
    return filled(layout, best, cost, budget)


def filled(layout: RankLayout, ranks: Ranks, cost: Callable[[Ranks], float], budget: float) -> Ranks:
    """`ranks` grown one at a time until no single one can grow within the budget.

    The rank that is the smallest share of its limit comes first (of equal ones the first), so ranks stay as
    uniform as the budget allows; a rank beyond what its neighbours can use is not grown.
    """
    while True:
        for place in sorted(range(len(ranks)), key=lambda n: (ranks[n] / layout.limits[n], n)):
            grown = grow(layout, ranks, place)
            if grown is not None and cost(grown) <= budget:
                ranks = grown
                break
        else:
            return ranks


def grow(layout: RankLayout, ranks: Ranks, place: int) -> Ranks | None:
    """`ranks` with one of them larger by 1; None beyond its limit or where that adds nothing."""
    grown = (*ranks[:place], ranks[place] + 1, *ranks[place + 1 :])
    return grown if grown[place] <= layout.limits[place] and layout.useful(grown, place) else None
