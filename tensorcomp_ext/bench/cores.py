"""The cores of a weight matrix by format: shapes, labels, and the least work of contracting them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

Labels = tuple[int, ...]
Group = tuple[int, ...]
"""Cores, by position, that are merged before they meet the rows."""


READ = 8
"""Multiply-adds that a core does in the time it takes to read one weight from its cache."""


@dataclass(frozen=True)
class Cores:
    """Shapes and labels of the cores of a weight matrix ``[prod(out_modes), prod(in_modes)]``.

    Labels 0, 1, … are the output modes, then the input modes, then the ranks; what is neither output nor
    input is summed over.
    """

    shapes: tuple[tuple[int, ...], ...]
    labels: tuple[Labels, ...]
    outputs: Labels
    inputs: Labels
    ranks: tuple[int, ...]
    """As the layer of this format takes them."""

    @cached_property
    def sizes(self) -> dict[int, int]:
        """Size of every label."""
        pairs = zip(self.labels, self.shapes, strict=True)
        return {label: size for labels, shape in pairs for label, size in zip(labels, shape, strict=True)}

    @property
    def numel(self) -> int:
        """Entries of all cores."""
        return sum(math.prod(shape) for shape in self.shapes)

    def volume(self, labels: Sequence[int] | set[int] | frozenset[int]) -> int:
        """Entries of a tensor with these labels."""
        return math.prod(self.sizes[label] for label in labels)

    def open_after(self, done: frozenset[int]) -> frozenset[int]:
        """Labels of a row after these cores have been contracted with it."""
        rest = self._held(i for i in range(len(self.shapes)) if i not in done)
        return (frozenset(self.inputs) | self._held(done)) & (frozenset(self.outputs) | rest)

    def merged(self, group: Group, done: frozenset[int]) -> frozenset[int]:
        """Labels of a group of cores merged, where the cores ``done`` have met the row before."""
        outside = self._held(i for i in range(len(self.shapes)) if i not in group and i not in done)
        return self._held(group) & (frozenset(self.outputs) | outside | self.open_after(done))

    def step_macs(self, group: Group, done: frozenset[int]) -> int:
        """Multiply-adds that contracting a merged group with one row takes."""
        return self.volume(self.open_after(done) | self.merged(group, done))

    def _held(self, cores: object) -> frozenset[int]:
        return frozenset(label for core in cores for label in self.labels[core])  # type: ignore[attr-defined]

    @functools.lru_cache(maxsize=64)  # noqa: B019  (a value object: few, small, hashed by what it holds)
    def least(self, rows: int) -> tuple[int, tuple[Group, ...]]:
        """The order of groups that takes least to bring so many rows through, and its multiply-adds.

        Merging cores is free here, as inference does it once; one group of all cores is the dense weight.
        Counted are multiply-adds and, ``READ`` of them each, the weights that must be read. Exact, by
        dynamic programming over the sets of cores.
        """
        every = range(len(self.shapes))
        best: dict[frozenset[int], tuple[int, tuple[Group, ...]]] = {frozenset(): (0, ())}
        for count in every:
            for done in map(frozenset, itertools.combinations(every, count)):
                cost, order = best[done]
                left = [i for i in every if i not in done]
                for size in range(1, len(left) + 1):
                    for group in itertools.combinations(left, size):
                        after = done | frozenset(group)
                        work = rows * self.step_macs(group, done)
                        total = cost + work + READ * self.volume(self.merged(group, done))
                        if after not in best or total < best[after][0]:
                            best[after] = (total, (*order, group))
        order = best[frozenset(every)][1]
        return rows * self.order_macs(order), order

    def order_macs(self, order: Sequence[Group]) -> int:
        """Multiply-adds of one row through these groups, one after the other."""
        placed = [frozenset(i for group in order[:k] for i in group) for k in range(len(order))]
        return sum(self.step_macs(group, done) for group, done in zip(order, placed, strict=True))

    def order_weights(self, order: Sequence[Group]) -> int:
        """Entries of the groups, each merged to one tensor."""
        placed = [frozenset(i for group in order[:k] for i in group) for k in range(len(order))]
        pairs = zip(order, placed, strict=True)
        return sum(self.volume(self.merged(group, done)) for group, done in pairs)

    @cached_property
    def pair(self) -> tuple[Group, Group] | None:
        """The two groups that take the fewest multiply-adds one after the other, each as one matrix; None
        where a single core cannot be split."""
        every = range(len(self.shapes))
        found: list[tuple[int, Group, Group]] = []
        for size in range(1, len(every)):
            for first in itertools.combinations(every, size):
                done = frozenset(first)
                second = tuple(i for i in every if i not in done)
                macs = self.step_macs(first, frozenset()) + self.step_macs(second, done)
                found.append((macs, first, second))
        return min(found)[1:] if found else None

    def equation(self, groups: Sequence[int] | None = None, result: Sequence[int] | None = None) -> str:
        """The einsum of the cores (or of some of them) into ``[outputs, inputs]`` (or other labels)."""
        chosen = range(len(self.shapes)) if groups is None else groups
        target = (*self.outputs, *self.inputs) if result is None else result
        return ",".join(_letters(self.labels[i]) for i in chosen) + "->" + _letters(target)

    def row_equation(self) -> str:
        """The einsum of rows ``[rows, *in_modes]`` and all cores into ``[rows, *out_modes]``."""
        cores = ",".join(_letters(labels) for labels in self.labels)
        return f"Z{_letters(self.inputs)},{cores}->Z{_letters(self.outputs)}"


def _letters(labels: Sequence[int]) -> str:
    return "".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"[label] for label in labels)


def _clipped(modes: Sequence[int], rank: int) -> list[int]:
    """Inner ranks of a train: no more than the product of the modes on either side."""
    return [min(rank, math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes))]


def _train(outs: Sequence[int], ins: Sequence[int], rank: int) -> Cores:
    modes = (*outs, *ins)
    return _string(modes, [(k,) for k in range(len(modes))], _clipped(modes, rank), ring=0, outs=len(outs))


def _ring(outs: Sequence[int], ins: Sequence[int], rank: int) -> Cores:
    modes = (*outs, *ins)
    ranks = [rank] * (len(modes) - 1)  # never a single core: there is an output and an input mode
    return _string(modes, [(k,) for k in range(len(modes))], ranks, ring=rank, outs=len(outs))


def _matrix_train(outs: Sequence[int], ins: Sequence[int], rank: int) -> Cores:
    pairs = [(k, len(outs) + k) for k in range(len(outs))]
    modes = (*outs, *ins)
    ranks = _clipped([o * i for o, i in zip(outs, ins, strict=True)], rank)
    return _string(modes, pairs, ranks, ring=0, outs=len(outs))


def _matrix_ring(outs: Sequence[int], ins: Sequence[int], rank: int) -> Cores:
    pairs = [(k, len(outs) + k) for k in range(len(outs))]
    ring = rank if len(outs) > 1 else 1  # a single core closes on itself
    return _string((*outs, *ins), pairs, [rank] * (len(outs) - 1), ring=ring, outs=len(outs))


def _string(
    modes: Sequence[int], held: Sequence[Labels], inner: Sequence[int], *, ring: int, outs: int
) -> Cores:
    """Cores in a row, each holding some modes; ``ring`` is the rank that closes it, 0 for none."""
    first = len(modes)  # the label of the rank before the first core
    ends = (ring or 1, ring or 1)
    sizes = [ends[0], *inner, ends[1]]
    names = [first + k for k in range(len(sizes))]
    if ring:
        names[-1] = first
    shapes, labels = [], []
    for k, own in enumerate(held):
        shapes.append((sizes[k], *(modes[m] for m in own), sizes[k + 1]))
        labels.append((names[k], *own, names[k + 1]))
    ranks = (ring, *inner) if ring else tuple(inner)
    places = range(len(modes))
    return Cores(tuple(shapes), tuple(labels), tuple(places[:outs]), tuple(places[outs:]), ranks)


def _canonical(outs: Sequence[int], ins: Sequence[int], rank: int) -> Cores:
    modes = (*outs, *ins)
    tied = len(modes)
    return Cores(
        tuple((n, rank) for n in modes),
        tuple((k, tied) for k in range(len(modes))),
        tuple(range(len(outs))),
        tuple(range(len(outs), len(modes))),
        (rank,),
    )


CORES: dict[str, Callable[[Sequence[int], Sequence[int], int], Cores]] = {
    "tt": _train,
    "ttm": _matrix_train,
    "tr": _ring,
    "tr_matrix": _matrix_ring,
    "cp": _canonical,
}
"""The cores of each format from output modes, input modes and one rank for every bond."""

PAIRED = ("ttm", "tr_matrix")
"""Formats whose cores hold an output and an input mode each, so that both have as many."""
