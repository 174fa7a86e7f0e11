"""Which ranks of a layer are worth measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from tensorcomp_ext.ranks.layouts import RankLayout, Ranks

FRACTIONS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
"""Of a mode's size."""


def sizes(limit: int) -> list[int]:
    """Values of a rank up to its limit that the kernels like: whole vectors where the limit holds several."""
    step = 1 if limit < 8 else 2 if limit < 24 else 4 if limit < 48 else 8
    found = {
        min(limit, max(min(step, limit), step * round(fraction * limit / step))) for fraction in FRACTIONS
    }
    return sorted(found)


def candidates(
    layout: RankLayout,
    macs: Callable[[Ranks], int],
    dense_macs: int,
    errors: Sequence[Callable[[Ranks], float]],
) -> list[Ranks]:
    """Ranks that no others beat in both operations and error for at least one of several like layers.

    Only those with fewer operations and parameters than the dense layer, by rising operations.

    Args:
        macs: of the chain of factors; errors: of every layer by ranks.
    """
    grid = [
        ranks
        for ranks in product(*map(sizes, layout.limits))
        if macs(ranks) < dense_macs
        and layout.params(ranks) < layout.numel
        and all(layout.useful(ranks, place) for place in range(len(ranks)))
    ]
    grid.sort(key=lambda ranks: (macs(ranks), ranks))
    efficient: set[Ranks] = set()
    for error in errors:
        least = float("inf")
        for ranks in grid:
            now = error(ranks)
            if now < least:
                least = now
                efficient.add(ranks)
    return [ranks for ranks in grid if ranks in efficient]


def evenly(ranks: Sequence[Ranks], most: int) -> list[Ranks]:
    """At most so many of a list, evenly spaced, its ends among them."""
    if len(ranks) <= most:
        return list(ranks)
    last = len(ranks) - 1
    return [ranks[place] for place in sorted({round(k * last / (most - 1)) for k in range(most)})]
