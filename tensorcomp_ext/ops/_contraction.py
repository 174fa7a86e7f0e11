"""The cheapest order in which the rows of an input meet the cores of a weight: exact, by dynamic programming.

A state is the set of cores that a row has met. A transition lets it meet a group of further cores, multiplied
with each other beforehand to one matrix; labels that no core beyond them carries are summed there. One group
of all cores is the dense weight, two groups are a pair of factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

Group = tuple[int, ...]
Order = tuple[Group, ...]
"""Groups of cores by index, in the order in which a row meets them."""

_LOOSE = 7
"""Up to so many cores a group may hold cores without a common label (their outer product)."""
_EXACT = 10
"""Beyond so many cores, neighbours are merged before the search."""


class Structure(NamedTuple):
    """A network of cores without its entries; hashable. Labels as in ``formats.Network``."""

    labels: tuple[tuple[int, ...], ...]
    """One label for each mode of each core."""
    sizes: tuple[tuple[int, int], ...]
    """Pairs (label, size)."""
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def size_of(self) -> dict[int, int]:
        return dict(self.sizes)


class Cost(Protocol):
    """What an order costs; hashable, so that orders found are kept."""

    def __hash__(self) -> int: ...

    def step(self, kept: int, new: int, contracted: int) -> float:
        """Cost of one product: for every row ``kept`` columns meet a matrix ``[new, contracted]``."""
        ...

    def merge(self, macs: int, size: int, stored: int) -> float:
        """Cost of making a matrix of ``size`` entries from cores of ``stored`` in ``macs`` multiply-adds.

        Infinite where no such matrix may be made.
        """
        ...


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of so many rows; those of merging cores count unless that is done once for all calls."""

    rows: int = 1
    merging: bool = True

    def step(self, kept: int, new: int, contracted: int) -> float:
        return self.rows * kept * new * contracted

    def merge(self, macs: int, size: int, stored: int) -> float:
        return macs if self.merging else 0


class _Graph:
    """Sets of cores and labels as bits of ints."""

    def __init__(self, structure: Structure) -> None:
        size_of = structure.size_of
        self._bit = {label: 1 << place for place, label in enumerate(size_of)}
        self._sizes = tuple(size_of.values())
        self.cores = tuple(self._bits(labels) for labels in structure.labels)
        self.full = (1 << len(self.cores)) - 1
        self.outputs, self.inputs = self._bits(structure.outputs), self._bits(structure.inputs)
        self._unions = {0: 0}
        self._products = {0: 1}
        self._connected: dict[int, bool] = {}

    def _bits(self, labels: tuple[int, ...]) -> int:
        found = 0
        for label in labels:
            found |= self._bit[label]
        return found

    def union(self, cores: int) -> int:
        """Labels that any of the cores carries."""
        found = self._unions.get(cores)
        if found is None:
            low = cores & -cores
            found = self._unions[cores] = self.union(cores ^ low) | self.cores[low.bit_length() - 1]
        return found

    def size(self, labels: int) -> int:
        """Product of the sizes of labels."""
        found = self._products.get(labels)
        if found is None:
            low = labels & -labels
            found = self.size(labels ^ low) * self._sizes[low.bit_length() - 1]
            self._products[labels] = found
        return found

    def open(self, cores: int) -> int:
        """Labels of the product of some cores that others, the input or the output carry too."""
        return self.union(cores) & (self.outputs | self.inputs | self.union(self.full ^ cores))

    def row(self, met: int) -> int:
        """Labels of a row that has met some cores."""
        return (self.inputs | self.union(met)) & (self.outputs | self.union(self.full ^ met))

    def connected(self, cores: int) -> bool:
        """Whether common labels join the cores."""
        found = self._connected.get(cores)
        if found is None:
            reached, grown = 0, cores & -cores
            while grown != reached:
                reached, labels = grown, self.union(grown)
                for core in _members(cores & ~reached):
                    if self.cores[core] & labels:
                        grown |= 1 << core
            found = self._connected[cores] = reached == cores
        return found

    def step(self, met: int, group: int) -> tuple[int, int, int] | None:
        """Labels kept, brought and summed where a row meets a group; None where it cannot.

        It cannot where nothing is summed, or where a label of both is needed later, which no matrix product
        can express.
        """
        row, later = self.row(met), self.outputs | self.union(self.full & ~(met | group))
        matrix = self.union(group) & (row | later)
        contracted = matrix & row
        if not contracted or contracted & later:
            return None
        return row & ~contracted, matrix & ~contracted, contracted


def _members(cores: int) -> Iterator[int]:
    while cores:
        low = cores & -cores
        yield low.bit_length() - 1
        cores ^= low


def _parts(cores: int) -> Iterator[int]:
    """Every set of some of the cores but the empty one."""
    part = cores
    while part:
        yield part
        part = (part - 1) & cores


@lru_cache(maxsize=256)
def _graph(structure: Structure) -> _Graph:
    return _Graph(structure)


def cheapest_order(
    structure: Structure, cost: Cost, groups: int | None = None, *, whole: bool = True
) -> Order | None:
    """The order of least ``cost``; of equal ones that of fewest groups.

    Exact for up to ten cores; of more, pairs whose product is smallest are merged before the search until ten
    are left. Groups of cores that no labels join are tried for up to seven cores.

    Args:
        groups: how many groups it must have; None for any number.
        whole: whether the order of one group, the dense weight, is among them.

    Returns:
        The order, or None where there is no such order.
    """
    if len(structure.labels) <= _EXACT:
        return _search(structure, cost, groups, whole)
    members, coarse = _coarsened(structure)
    found = _search(coarse, cost, groups, whole)
    if found is None:
        return None
    return tuple(tuple(sorted(core for i in group for core in members[i])) for group in found)


@lru_cache(maxsize=4096)
def _search(structure: Structure, cost: Cost, groups: int | None, whole: bool) -> Order | None:
    graph = _graph(structure)
    full, count = graph.full, len(graph.cores)
    if count <= _LOOSE:
        allowed = set(_parts(full))
    else:
        allowed = {part for part in _parts(full) if graph.connected(part)}
    merging = {group: cost.merge(*_merge(structure, group)) for group in allowed}
    allowed = {g for g, spent in merging.items() if spent < math.inf and (whole or g != full)}
    # States: cores met and, where their number is prescribed, groups so far. Cost, groups, and the way there.
    best: dict[tuple[int, int], tuple[float, int, tuple[int, ...]]] = {(0, 0): (0.0, 0, ())}
    for met in range(full):
        for steps in range(1 if groups is None else groups):
            here = best.get((met, steps))
            if here is None:
                continue
            for group in _parts(full & ~met):
                if group not in allowed:
                    continue
                labels = graph.step(met, group)
                if labels is None:
                    continue
                spent = here[0] + cost.step(*map(graph.size, labels)) + merging[group]
                state = met | group, 0 if groups is None else steps + 1
                found = (spent, here[1] + 1, (*here[2], group))
                if state not in best or found < best[state]:
                    best[state] = found
    end = best.get((full, groups or 0))
    return None if end is None else tuple(tuple(_members(group)) for group in end[2])


def order_cost(structure: Structure, order: Order, cost: Cost) -> float:
    """Cost of an order.

    Raises:
        ValueError: an order that no chain of products can follow.
    """
    graph, met, total = _graph(structure), 0, 0.0
    for group in order:
        cores = sum(1 << core for core in group)
        labels = graph.step(met, cores)
        if labels is None:
            raise ValueError(f"chain: a row that has met {met:b} cannot meet the cores {group}")
        total += cost.step(*map(graph.size, labels)) + cost.merge(*_merge(structure, cores))
        met |= cores
    if met != graph.full:
        raise ValueError(f"chain: {order} leaves out some of {len(graph.cores)} cores")
    return total


def describe(order: Order) -> str:
    """An order for people: "x·G5·(G3 G4)" for a row that meets core 5, then cores 3 and 4 merged."""
    return "·".join(
        ["x", *(f"G{g[0]}" if len(g) == 1 else f"({' '.join(f'G{core}' for core in g)})" for g in order)]
    )


# --- products of cores ---


class Merge(NamedTuple):
    """How the cores of a group are multiplied: pairs of groups, the last one the whole."""

    macs: int
    pairs: tuple[tuple[Group, Group], ...]


def merge_plan(structure: Structure, group: Group) -> Merge:
    """The pairwise products of least multiply-adds that merge a group."""
    cores = sum(1 << core for core in group)
    table = _splits(structure, cores)
    pairs: list[tuple[Group, Group]] = []

    def descend(part: int) -> None:
        half = table[part][1]
        if half:
            descend(half)
            descend(part ^ half)
            pairs.append((tuple(_members(half)), tuple(_members(part ^ half))))

    descend(cores)
    return Merge(table[cores][0], tuple(pairs))


def _merge(structure: Structure, cores: int) -> tuple[int, int, int]:
    """Multiply-adds that merge some cores, the size of what comes out, and that of the cores."""
    graph = _graph(structure)
    size_of = structure.size_of
    stored = sum(math.prod(size_of[label] for label in structure.labels[core]) for core in _members(cores))
    return _splits(structure, cores)[cores][0], graph.size(graph.open(cores)), stored


def _splits(structure: Structure, cores: int) -> dict[int, tuple[int, int]]:
    """For sets of cores, these among them: multiply-adds of their product, and one half of its last pair."""
    if len(structure.labels) <= _EXACT:
        return _every_split(structure)
    return _greedy_splits(structure, cores)


@lru_cache(maxsize=256)
def _every_split(structure: Structure) -> dict[int, tuple[int, int]]:
    graph = _graph(structure)
    found = {1 << core: (0, 0) for core in range(len(graph.cores))}
    for part in range(1, graph.full + 1):  # whatever is part of it has a smaller number
        if part in found:
            continue
        joined = graph.connected(part)
        best: tuple[int, int] | None = None
        for half in _parts(part & (part - 1)):  # without the lowest core: every split is seen once
            other = part ^ half
            if joined and not (graph.connected(half) and graph.connected(other)):
                continue  # an outer product, needed only where no label joins the whole
            spent = found[half][0] + found[other][0] + graph.size(graph.open(half) | graph.open(other))
            if best is None or (spent, half) < best:
                best = spent, half
        assert best is not None
        found[part] = best
    return found


@lru_cache(maxsize=256)
def _greedy_splits(structure: Structure, cores: int) -> dict[int, tuple[int, int]]:
    """The same by merging, again and again, the pair of the smallest product."""
    graph = _graph(structure)
    found = {1 << core: (0, 0) for core in _members(cores)}
    parts = list(found)
    while len(parts) > 1:
        first, second = _smallest_pair(graph, parts)
        spent = graph.size(graph.open(first) | graph.open(second))
        found[first | second] = (found[first][0] + found[second][0] + spent, first)
        parts = [part for part in parts if part not in (first, second)] + [first | second]
    return found


def _smallest_pair(graph: _Graph, parts: list[int]) -> tuple[int, int]:
    pairs = [(a, b) for place, a in enumerate(parts) for b in parts[place + 1 :]]
    joined = [(a, b) for a, b in pairs if graph.open(a) & graph.open(b)]
    return min(joined or pairs, key=lambda pair: (graph.size(graph.open(pair[0] | pair[1])), pair))


@lru_cache(maxsize=256)
def _coarsened(structure: Structure) -> tuple[tuple[Group, ...], Structure]:
    """Groups of cores, and the network of their products with at most ``_EXACT`` cores."""
    graph = _graph(structure)
    parts = [1 << core for core in range(len(graph.cores))]
    while len(parts) > _EXACT:
        first, second = _smallest_pair(graph, parts)
        parts = [part for part in parts if part not in (first, second)] + [first | second]
    bits = {label: 1 << place for place, label in enumerate(structure.size_of)}
    labels = tuple(tuple(label for label, bit in bits.items() if graph.open(part) & bit) for part in parts)
    return tuple(tuple(_members(part)) for part in parts), structure._replace(labels=labels)
