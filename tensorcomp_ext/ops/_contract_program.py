"""How the contraction of a network of cores is written down: labels of their modes, and pairs to multiply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

MOST_CORES, MOST_DIMS, MOST_LABELS = 12, 12, 31  # csrc/kernels/contract_program.h
_BITS = 5

Labels = tuple[int, ...]


class PairProgram(NamedTuple):
    """A tree of products of two tensors. Modes of one label are summed over where both tensors have it.

    A label of one core alone that the result does not have must have size 1.
    """

    labels: tuple[Labels, ...]
    """For each core the labels of its modes, from 1 to 31, each once."""
    result: Labels
    """Labels of the result, in the order of its modes."""
    pairs: tuple[tuple[int, int], ...]
    """Places of two tensors, the smaller first: cores count from 0, and then the products of the pairs."""

    def products(self) -> list[Labels]:
        """The labels of every pair's product, those of the last in the order of the result."""
        alone = self.alone()
        held = [tuple(x for x in group if x not in alone) for group in self.labels]
        for first, second in self.pairs:
            a, b = held[first], held[second]
            held.append(tuple(x for x in a if x not in b) + tuple(x for x in b if x not in a))
        return [*held[len(self.labels) : -1], self.result]

    def alone(self) -> set[int]:
        """Labels that one core has and nothing else."""
        count = Counter(x for group in (*self.labels, self.result) for x in group)
        return {label for label, times in count.items() if times == 1} - set(self.result)

    def encode(self) -> list[int]:
        """As the ops take it; :func:`decode` reads it.

        A number for each core and one for the result, whose lowest five bits are the first label, the next
        five the second; then one for each pair, five bits for its first place and the rest for the other.
        """
        groups = [sum(x << _BITS * at for at, x in enumerate(group)) for group in (*self.labels, self.result)]
        return groups + [first | second << _BITS for first, second in self.pairs]


def numbered(
    labels: Sequence[Labels], result: Labels, pairs: Sequence[tuple[int, int]], sizes: Mapping[int, int]
) -> PairProgram | None:
    """The program of any labels, renumbered; None where the op does not take it.

    It takes up to 12 cores and modes of a tensor and 31 labels, of which each occurs in two cores and is
    summed over, or in one core and the result, or in one core and has size 1.
    """
    number = {label: at for at, label in enumerate(dict.fromkeys(x for group in labels for x in group), 1)}
    if len(number) > MOST_LABELS or max(map(len, (*labels, result))) > MOST_DIMS:
        return None
    program = PairProgram(
        tuple(tuple(number[label] for label in group) for group in labels),
        tuple(number[label] for label in result),
        tuple(pairs),
    )
    alone = program.alone()
    summed_alone = any(number[label] in alone and sizes[label] != 1 for label in number)
    return None if summed_alone or fault(program) else program


def fault(program: PairProgram) -> str:
    """What is wrong with a program, in words; empty for a sound one."""
    labels, result, pairs = program
    if not 2 <= len(labels) <= MOST_CORES or len(pairs) != len(labels) - 1:
        return f"2 to {MOST_CORES} cores and a pair less are needed, got {len(labels)} and {len(pairs)}"
    for group in (*labels, result):
        if len(set(group)) != len(group) or not all(1 <= x <= MOST_LABELS for x in group):
            return f"a tensor has labels from 1 to {MOST_LABELS}, each once, got {group}"
    alone = program.alone()
    waiting = {place: set(group) - alone for place, group in enumerate(labels)}
    for number, (first, second) in enumerate(pairs):
        if first >= second or first not in waiting or second not in waiting:
            return (
                f"pair {number} needs two places in ascending order that were not used, got {first, second}"
            )
        a, b = waiting.pop(first), waiting.pop(second)
        elsewhere = set(result).union(*waiting.values())
        if a & b & elsewhere:
            return f"pair {number} must share no label that something else has, got {a} and {b}"
        waiting[len(labels) + number] = a ^ b
    made = program.products()
    if set(result) != waiting[len(labels) + len(pairs) - 1]:
        return f"the last pair has not the labels of the result {result}"
    longest = max(map(len, (*labels, *made)))
    return f"tensors have at most {MOST_DIMS} modes, got {longest}" if longest > MOST_DIMS else ""


def _unpacked(number: int) -> Labels:
    found = []
    while number > 0:
        found.append(number & (1 << _BITS) - 1)
        number >>= _BITS
    return tuple(found)


def decode(numbers: Sequence[int]) -> PairProgram:
    """The program that :meth:`PairProgram.encode` wrote.

    Raises:
        ValueError: no such program.
    """
    return _decode(tuple(numbers))


@lru_cache(maxsize=1024)
def _decode(numbers: tuple[int, ...]) -> PairProgram:
    count = len(numbers) // 2
    if len(numbers) % 2 or any(number < 0 for number in numbers):
        raise ValueError(f"contract: program has no such numbers: {list(numbers)}")
    pairs = tuple((number & (1 << _BITS) - 1, number >> _BITS) for number in numbers[count + 1 :])
    program = PairProgram(
        tuple(map(_unpacked, numbers[:count])),
        _unpacked(numbers[count]) if count else (),
        pairs,
    )
    if reason := fault(program):
        raise ValueError(f"contract: program: {reason}")
    return program


def sizes_of(program: PairProgram, shapes: Sequence[Sequence[int]]) -> Mapping[int, int]:
    """Size of each label.

    Raises:
        ValueError: shapes that do not fit the program.
    """
    if len(shapes) != len(program.labels):
        raise ValueError(f"contract: cores must be {len(program.labels)} tensors, got {len(shapes)}")
    sizes: dict[int, int] = {}
    alone = program.alone()
    for place, (group, shape) in enumerate(zip(program.labels, shapes, strict=True)):
        if len(group) != len(shape):
            raise ValueError(f"contract: cores[{place}] must have {len(group)} modes, got {list(shape)}")
        for at, (label, size) in enumerate(zip(group, shape, strict=True)):
            if label in alone and size != 1:
                raise ValueError(
                    f"contract: cores[{place}] must have size 1 in mode {at}, which nothing else has, "
                    f"got {list(shape)}"
                )
            if sizes.setdefault(label, size) != size:
                raise ValueError(
                    f"contract: cores[{place}] must have size {sizes[label]} in mode {at}, got {list(shape)}"
                )
    return sizes
