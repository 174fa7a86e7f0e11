"""Contraction of a few labelled tensors, two at a time in the cheapest order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..ops._contraction import Structure, merge_plan
from ..ops._contraction_layout import einsum_equation

Labels = tuple[int, ...]


@dataclass(frozen=True)
class Contraction:
    """The sum over all labels that the result does not have, as products of two tensors."""

    steps: tuple[tuple[int, int, str], ...]
    """Places of two tensors, removed from the list, and the einsum equation whose result is appended."""
    macs: int
    """Multiply-adds at the sizes it was planned for."""
    order: tuple[int, ...] | None = None
    """Of a single tensor: its dims that are summed over, then the others in the order of the result."""
    dims: int = 0
    """Dimensions of the result."""

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        if self.order is not None:
            only = tensors[0].permute(self.order)
            for _ in range(only.dim() - self.dims):
                only = only[0] if only.shape[0] == 1 else only.sum(0)
            return only
        held = list(tensors)
        for first, second, equation in self.steps:
            right, left = held.pop(second), held.pop(first)
            held.append(torch.einsum(equation, left, right))
        return held[0]


def contraction(
    labels: Sequence[Sequence[int]], sizes: Mapping[int, int], result: Sequence[int]
) -> Contraction:
    """The cheapest contraction of tensors with these labels to a tensor with the labels ``result``.

    A label may occur in any number of tensors and is summed over once, as in einsum.
    """
    present = sorted({label for group in labels for label in group})
    return _planned(tuple(map(tuple, labels)), tuple((k, sizes[k]) for k in present), tuple(result))


@lru_cache(maxsize=1024)
def _planned(labels: tuple[Labels, ...], sizes: tuple[tuple[int, int], ...], result: Labels) -> Contraction:
    size = dict(sizes)
    if len(labels) == 1:
        (group,) = labels
        order = [place for place, label in enumerate(group) if label not in result]
        order += [group.index(label) for label in result]
        return Contraction((), 0, tuple(order), len(result))
    tree = merge_plan(Structure(labels, sizes, result, ()), tuple(range(len(labels)))).pairs
    steps: list[tuple[int, int, str]] = []
    held: list[tuple[frozenset[int], Labels]] = [
        (frozenset([place]), group) for place, group in enumerate(labels)
    ]
    macs = 0
    for left, right in tree:
        places = sorted((_place(held, frozenset(left)), _place(held, frozenset(right))))
        (_, a), (_, b) = held[places[0]], held[places[1]]
        del held[places[1]], held[places[0]]
        needed = set(result).union(*(group for _, group in held))
        union = tuple(dict.fromkeys(a + b))
        kept = result if not held else tuple(label for label in union if label in needed)
        macs += math.prod(size[label] for label in union)
        steps.append((places[0], places[1], einsum_equation([a, b], kept)))
        held.append((frozenset(left + right), kept))
    return Contraction(tuple(steps), macs, None, len(result))


def _place(held: Sequence[tuple[frozenset[int], Labels]], group: frozenset[int]) -> int:
    return next(place for place, (found, _) in enumerate(held) if found == group)
