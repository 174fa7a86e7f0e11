"""An order of contraction as a chain program, its dims laid out so that little is moved, and its matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, permutations
from typing import NamedTuple

from torch import Tensor

from ._chain_program import Program, Step
from ._contraction import Group, Order, Structure
from ._contraction_products import Contraction, group_contraction

_BEAM = 24
_WIDE = 8
"""Trailing entries that fill a vector: from here on a product over an inner dim needs no packing."""

_Layout = tuple[int, ...]
_Sets = list[tuple[frozenset[int], frozenset[int]]]
"""Of each step, the labels summed and the labels brought."""


class Recipe(NamedTuple):
    """How the matrix of a step is made from the cores: their contraction, then a reshape."""

    cores: Group
    contraction: Contraction
    shape: tuple[int, int]

    def build(self, cores: Sequence[Tensor]) -> Tensor:
        """The matrix ``[prod(new), prod(contracted)]``, differentiable in the cores."""
        return self.contraction([cores[core] for core in self.cores], self.shape)


class Chain(NamedTuple):
    """An order as the chain op takes it."""

    program: Program
    recipes: tuple[Recipe, ...]

    def matrices(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """One matrix for each step."""
        return [recipe.build(cores) for recipe in self.recipes]


@lru_cache(maxsize=4096)
def chain_of(structure: Structure, order: Order) -> Chain:
    """The chain of products that follows ``order``.

    After each step the dims are arranged so that those of the next step lie side by side, at the end or
    before a long trailing part, and so that results go where they come from: sweeps from either end of a
    train move nothing. The last step leaves the outputs row-major.

    Raises:
        ValueError: an order that no chain of products can follow.
    """
    sets = _label_sets(structure, order)
    ones = _dropped(structure, sets)
    layouts = _layouts(structure, [(summed - ones, new - ones) for summed, new in sets], ones)
    recipes = []
    for (contracted, new), group, before, after in zip(sets, order, layouts, layouts[1:], strict=False):
        columns = tuple(label for label in before if label in contracted)
        rows = tuple(label for label in after if label in new)
        recipes.append(_recipe(structure, tuple(sorted(group)), rows, columns))
    return Chain(_program(structure, layouts), tuple(recipes))


def _dropped(structure: Structure, sets: _Sets) -> frozenset[int]:
    """Labels of size 1 that are no dims of a row: all but those without which a row or a step has none."""
    ones = {label for label, size in structure.sizes if size == 1}
    for needed in (structure.inputs, structure.outputs, *(contracted for contracted, _ in sets)):
        if ones.issuperset(needed):
            ones -= set(sorted(needed)[:1])
    return frozenset(ones)


def _program(structure: Structure, layouts: Sequence[_Layout]) -> Program:
    size_of, first = structure.size_of, _blocks(layouts)
    steps = []
    for before, after in pairwise(layouts):
        here, there = ([label for label in layout if label in first] for layout in (before, after))
        kept = [label for label in here if label in there]
        brought = [label for label in there if label not in here]
        result = [*kept, *brought]
        steps.append(
            Step(
                tuple(place for place, label in enumerate(here) if label not in there),
                tuple(_numel(first[label], size_of) for label in brought),
                tuple(result.index(label) for label in there),
            )
        )
    dims = tuple(_numel(first[label], size_of) for label in layouts[0] if label in first)
    return Program(dims, tuple(steps))


def _blocks(layouts: Sequence[_Layout]) -> dict[int, _Layout]:
    """Labels that always lie side by side, as one dim under the first of them."""
    after: dict[int, set[int | None]] = {}
    before: dict[int, set[int | None]] = {}
    for layout in layouts:
        for here, there in zip((None, *layout), (*layout, None), strict=True):
            if here is not None:
                after.setdefault(here, set()).add(there)
            if there is not None:
                before.setdefault(there, set()).add(here)
    joined = {
        label: next(iter(following))
        for label, following in after.items()
        if len(following) == 1 and None not in following and before[next(iter(following))] == {label}  # type: ignore[index]
    }
    blocks: dict[int, _Layout] = {}
    for label in after:
        if label not in joined.values():
            block = [label]
            while (following := joined.get(block[-1])) is not None:
                block.append(following)
            blocks[label] = tuple(block)
    return blocks


# --- layout ---


def _label_sets(structure: Structure, order: Order) -> _Sets:
    row, met, found = set(structure.inputs), set[int](), list[tuple[frozenset[int], frozenset[int]]]()
    count = len(structure.labels)
    for group in order:
        met |= set(group)
        later = set(structure.outputs).union(*(structure.labels[c] for c in range(count) if c not in met))
        matrix = set().union(*(structure.labels[c] for c in group)) & (row | later)
        contracted, new = matrix & row, matrix - row
        if not contracted or contracted & later:
            raise ValueError(f"chain: no products follow the order {order}")
        row = (row - contracted) | new
        found.append((frozenset(contracted), frozenset(new)))
    if row != set(structure.outputs):
        raise ValueError(f"chain: the order {order} does not lead to the outputs {structure.outputs}")
    return found


def _layouts(structure: Structure, sets: _Sets, ones: frozenset[int]) -> list[_Layout]:
    """Order of the labels of a row before each step and at the end: the cheapest found by a beam search."""
    size_of = structure.size_of
    start, end = (tuple(m for m in modes if m not in ones) for modes in (structure.inputs, structure.outputs))
    ways: dict[_Layout, tuple[float, tuple[_Layout, ...]]] = {start: (0.0, ())}
    for place, (contracted, new) in enumerate(sets):
        following: dict[_Layout, tuple[float, tuple[_Layout, ...]]] = {}
        for before, (spent, way) in ways.items():
            cost = spent + _gather_cost(before, contracted, size_of)
            if place + 1 == len(sets):
                choices: Iterator[_Layout] = iter([end])
            else:
                choices = _arrangements(before, contracted, new, sets[place + 1][0])
            for after in choices:
                total = cost + _scatter_cost(before, after, contracted, new, size_of)
                if after not in following or total < following[after][0]:
                    following[after] = total, (*way, before)
        kept = sorted(following.items(), key=lambda item: item[1][0])[:_BEAM]
        ways = dict(kept)
    ((last, (_, way)),) = ways.items()
    return [*way, last]


def _runs(layout: _Layout, chosen: frozenset[int]) -> int:
    """Stretches of neighbouring labels that the chosen ones form."""
    inside = [label in chosen for label in layout]
    return sum(here and not before for before, here in zip([False, *inside], inside, strict=False))


def _numel(labels: Sequence[int], size_of: dict[int, int]) -> int:
    return math.prod(size_of[label] for label in labels)


def _gather_cost(before: _Layout, contracted: frozenset[int], size_of: dict[int, int]) -> float:
    """Entries that have to be moved before the labels of a step can be summed."""
    runs = _runs(before, contracted)
    if runs > 1:
        # A ring index in front of all is one more loop over products that are in place.
        leading = runs == 2 and before[0] in contracted
        return (0.5 if leading else runs - 1.0) * _numel(before, size_of)
    end = max(place for place, label in enumerate(before) if label in contracted) + 1
    inner = _numel(before[end:], size_of)
    return 0.0 if inner == 1 or inner >= _WIDE else 0.5 * _numel(before, size_of)


def _scatter_cost(
    before: _Layout, after: _Layout, contracted: frozenset[int], new: frozenset[int], size_of: dict[int, int]
) -> float:
    """Entries that a step writes elsewhere than a product of what lies side by side would leave them."""
    places = [place for place, label in enumerate(before) if label in contracted]
    outer = tuple(label for label in before[: places[-1]] if label not in contracted)
    inner = before[places[-1] + 1 :]
    brought = tuple(label for label in after if label in new)
    if after == outer + brought + inner:
        return 0.0
    size = _numel(after, size_of)
    if after == outer + inner + brought:
        return 0.3 * size
    kept = outer + inner
    split = len(brought)
    if any(after == brought[:j] + outer + brought[j:] + inner for j in range(1, split)):
        return 0.2 * size  # blocks of rows of the matrix, each to a place of its own
    return (0.6 if tuple(label for label in after if label not in new) == kept else 1.0) * size


def _arrangements(
    before: _Layout, contracted: frozenset[int], new: frozenset[int], following: frozenset[int]
) -> Iterator[_Layout]:
    """Orders of the labels after a step that are worth a look."""
    places = [place for place, label in enumerate(before) if label in contracted]
    outer = tuple(label for label in before[: places[-1]] if label not in contracted)
    inner = before[places[-1] + 1 :]
    ordered = sorted(new)
    found = permutations(ordered) if len(ordered) <= 3 else iter([tuple(ordered)])
    for brought in found:
        yield outer + brought + inner
        if inner:
            yield outer + inner + brought
        if outer:
            for split in range(1, len(brought) + 1):
                yield brought[:split] + outer + brought[split:] + inner
        gathered = outer + brought + inner
        summed = tuple(label for label in gathered if label in following)
        yield (*(label for label in gathered if label not in following), *summed)
        yield (*summed, *(label for label in gathered if label not in following))


# --- matrices ---


def _recipe(structure: Structure, group: Group, rows: _Layout, columns: _Layout) -> Recipe:
    """How to make the matrix of a group with these labels, in this order."""
    size_of = structure.size_of
    count = len(structure.labels)
    wanted = (*rows, *columns)
    outside = {*structure.outputs, *structure.inputs}.union(
        *(structure.labels[core] for core in range(count) if core not in group)
    )
    carried = dict.fromkeys(label for core in group for label in structure.labels[core] if label in outside)
    dropped = tuple(label for label in carried if label not in wanted)  # of size 1: they move nothing
    return Recipe(
        group,
        group_contraction(structure, group, (*wanted, *dropped)),
        (_numel(rows, size_of), _numel(columns, size_of)),
    )
