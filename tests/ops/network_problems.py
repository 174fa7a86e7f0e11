"""Networks of cores that the tests of contraction and of the linear ops share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from string import ascii_letters

import torch
from torch import Tensor

from tensorcomp_ext.ops._contraction import Macs as _Macs
from tensorcomp_ext.ops._contraction import Order, Structure, order_cost
from tensorcomp_ext.ops._network_linear import matrix_structure, train_structure


def train_cores(modes: tuple[int, ...], ranks: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of cores [r, n, r']; ``ranks`` holds the first and the last one too."""
    return [(left, n, right) for left, n, right in zip(ranks, modes, ranks[1:], strict=False)]


def matrix_cores(
    outs: tuple[int, ...], ins: tuple[int, ...], ranks: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Shapes of cores [r, out, in, r']."""
    return [(r, o, i, s) for r, o, i, s in zip(ranks, outs, ins, ranks[1:], strict=False)]


def _train(outs: tuple[int, ...], ins: tuple[int, ...], ranks: tuple[int, ...], ring: bool) -> Structure:
    cores = [torch.empty(shape, device="meta") for shape in train_cores((*outs, *ins), ranks)]
    return train_structure(cores, len(outs), ring)


def _matrix(outs: tuple[int, ...], ins: tuple[int, ...], ranks: tuple[int, ...]) -> Structure:
    return matrix_structure([torch.empty(s, device="meta") for s in matrix_cores(outs, ins, ranks)])


STRUCTURES = {
    "pair": _train((7,), (5,), (1, 3, 1), False),
    "train": _train((2, 5), (3, 7), (1, 2, 4, 3, 1), False),
    "long train": _train((2, 3, 4), (3, 2, 5), (1, 2, 3, 2, 3, 2, 1), False),
    "rank 1": _train((2, 5), (3, 4), (1, 1, 1, 1, 1), False),
    "ring": _train((2, 5), (3, 7), (2, 3, 2, 4, 2), True),
    "ring of rank 1": _train((2, 5), (3, 7), (1, 3, 2, 4, 1), True),
    "one mode a side": _train((6,), (5,), (3, 4, 3), True),
    "modes of one": _train((1, 4, 1), (1, 3), (1, 1, 3, 2, 2, 1), False),
    "nothing but one": _train((1, 1), (1, 1), (1, 1, 1, 1, 1), False),
    "matrix": _matrix((3, 2, 4), (5, 2, 3), (1, 2, 3, 1)),
    "matrix of rank 1": _matrix((3, 2, 4), (5, 2, 3), (1, 1, 1, 1)),
    "matrix ring": _matrix((3, 2, 4), (5, 2, 3), (3, 2, 4, 3)),
    "one core": _matrix((3,), (5,), (2, 2)),
    "cp": Structure(
        ((0, 9), (1, 9), (2, 9), (3, 9)), ((0, 3), (1, 2), (2, 4), (3, 3), (9, 5)), (0, 1), (2, 3)
    ),
    "tucker": Structure(
        ((10, 11, 12, 13), (0, 10), (1, 11), (2, 12), (3, 13)),
        ((0, 3), (1, 4), (2, 3), (3, 5), (10, 2), (11, 3), (12, 2), (13, 3)),
        (0, 1),
        (2, 3),
    ),
}
"""Trains, rings, matrices of both kinds, CP (one label in every core) and Tucker."""


def random_cores(structure: Structure, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    size_of = structure.size_of
    return [torch.randn([size_of[label] for label in labels], dtype=dtype) for labels in structure.labels]


def dense_weight(structure: Structure, cores: list[Tensor]) -> Tensor:
    """The matrix by one einsum over everything."""
    letters = {label: ascii_letters[place] for place, (label, _) in enumerate(structure.sizes)}

    def word(labels: tuple[int, ...]) -> str:
        return "".join(letters[label] for label in labels)

    equation = ",".join(map(word, structure.labels)) + "->" + word((*structure.outputs, *structure.inputs))
    rows = math.prod(structure.size_of[label] for label in structure.outputs)
    return torch.einsum(equation, *cores).reshape(rows, -1)


def every_order(structure: Structure) -> list[Order]:
    """All orders there are, by trying."""

    def follow(left: tuple[int, ...], order: Order) -> Iterator[Order]:
        if not left:
            yield order
        for count in range(1, len(left) + 1):
            for group in combinations(left, count):
                rest = tuple(core for core in left if core not in group)
                if _possible(structure, (*order, group), rest):
                    yield from follow(rest, (*order, group))

    return list(follow(tuple(range(len(structure.labels))), ()))


def _possible(structure: Structure, order: Order, rest: tuple[int, ...]) -> bool:
    try:
        order_cost(structure, (*order, rest) if rest else order, _Macs())
    except ValueError:
        # The rest may be what is wrong: it counts only where it comes alone.
        if not rest:
            return False
        row = set(structure.inputs)
        met: set[int] = set()
        for group in order:
            met |= set(group)
            later = set(structure.outputs).union(
                *(labels for core, labels in enumerate(structure.labels) if core not in met)
            )
            matrix = set().union(*(structure.labels[core] for core in group)) & (row | later)
            contracted = matrix & row
            if not contracted or contracted & later:
                return False
            row = (row | matrix) - contracted
    return True
