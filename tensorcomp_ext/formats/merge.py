"""A network of cores merged to two matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ._contraction import contraction
from .forms import Network, TwoFactor


def two_factor(network: Network) -> TwoFactor | None:
    """``W = a b`` with all output modes in a and all input modes in b; None where a core has modes of both.

    Cores with modes of neither, as Tucker's, go to the side that leaves the smaller rank. Differentiable.
    """
    outputs, inputs = set(network.outputs), set(network.inputs)
    left: list[int] = []
    right: list[int] = []
    neutral: list[int] = []
    for place, labels in enumerate(network.labels):
        if outputs & set(labels) and inputs & set(labels):
            return None
        side = left if outputs & set(labels) else right if inputs & set(labels) else neutral
        side.append(place)
    splits = [(left + neutral, right), (left, right + neutral)] if neutral else [(left, right)]
    sizes = network.sizes

    def bond(split: tuple[list[int], list[int]]) -> list[int]:
        a, b = ({label for place in side for label in network.labels[place]} for side in split)
        return sorted(a & b)

    chosen = min(splits, key=lambda split: math.prod(sizes[label] for label in bond(split)))
    shared = tuple(bond(chosen))
    rank = math.prod(sizes[label] for label in shared)

    def merged(side: Sequence[int], result: tuple[int, ...]) -> Tensor:
        contract = contraction([network.labels[place] for place in side], sizes, result)
        return contract([network.cores[place] for place in side])

    a = merged(chosen[0], network.outputs + shared).reshape(-1, rank)
    b = merged(chosen[1], shared + network.inputs).reshape(rank, -1)
    return TwoFactor(a, b)
