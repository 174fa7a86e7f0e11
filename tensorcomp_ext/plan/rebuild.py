"""What it costs to multiply factors with each other at a call, as stages of the cost model."""

from __future__ import annotations

import math
from collections import Counter

from ..formats import Network
from ..ops.contract import native_support
from .base import Stage
from .case import Case
from .layer import PlannedLayer


def merges_natively(network: Network) -> bool:
    """Whether the ``contract`` op merges cores of a network: no label is in three of them."""
    count = Counter(label for labels in network.labels for label in labels)
    return max(count.values()) <= 2 and native_support(network.cores).ok


def merge_stage(macs: int, moved: int, width: int, products: int, natively: bool, training: bool) -> Stage:
    """Products of factors, ``moved`` numbers of factors and result.

    Natively all in one call forward and one backward, at the rate of chains of products; else products of the
    library, one by one, of matrices that are ``width`` wide.
    """
    if natively:
        return Stage("chain", macs, cube_side(macs), moved, 2 if training else 1)
    return Stage("linear", macs, width, moved, products)


def cube_side(macs: int) -> int:
    """Width of small products of so many multiply-adds."""
    return max(1, min(round(macs ** (1 / 3)), 64))


def rebuild_stage(layer: PlannedLayer, case: Case) -> Stage:
    """The dense weight from its factors."""
    weight = layer.weight
    ranks = weight.rank
    inner = ranks if isinstance(ranks, int) else min(ranks, default=1)
    moved = weight.numel + math.prod(weight.shape)
    natively = weight.rebuilds_natively()
    return merge_stage(
        weight.rebuild_macs(), moved, inner, weight.rebuild_products(), natively, case.training
    )


def part_stages(layer: PlannedLayer, case: Case) -> list[Stage]:
    """The parts of a form that training multiplies of several factors at each call."""
    if not case.training:
        return []
    return [
        merge_stage(m.macs, m.elements, cube_side(m.macs), m.products, m.natively, training=True)
        for m in layer.weight.merges()
    ]
