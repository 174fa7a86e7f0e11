"""How a chain of matrix products over the modes of each row is written down, for ops and planner alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """One product: some dims of a row are contracted with a matrix ``[prod(new), prod(contracted)]``."""

    contracted: tuple[int, ...]
    """Positions of the dims summed over; row-major they index the columns of the matrix."""
    new: tuple[int, ...]
    """Sizes of the dims that the rows of the matrix bring, row-major."""
    order: tuple[int, ...]
    """Order of the result's dims, as positions in (the dims kept, in order, then the new ones)."""


class Program(NamedTuple):
    """What happens to every row: its dims, row-major in memory, and the steps."""

    dims: tuple[int, ...]
    steps: tuple[Step, ...]

    def dims_after(self, count: int) -> tuple[int, ...]:
        """Dims of a row after ``count`` steps."""
        dims = self.dims
        for step in self.steps[:count]:
            kept = [size for place, size in enumerate(dims) if place not in step.contracted]
            arranged = [*kept, *step.new]
            dims = tuple(arranged[place] for place in step.order)
        return dims

    def matrix_shapes(self) -> list[tuple[int, int]]:
        """Shape of every step's matrix."""
        return [
            (
                math.prod(step.new),
                math.prod(self.dims_after(i)[place] for place in step.contracted),
            )
            for i, step in enumerate(self.steps)
        ]

    @property
    def in_features(self) -> int:
        return math.prod(self.dims)

    @property
    def out_features(self) -> int:
        return math.prod(self.dims_after(len(self.steps)))

    def macs(self) -> int:
        """Multiply-adds of one row."""
        return sum(math.prod(self.dims_after(i)) * rows for i, (rows, _) in enumerate(self.matrix_shapes()))

    def encode(self) -> list[int]:
        """As the ops take it; :func:`decode` reads it.

        The number of dims and their sizes, the number of steps, and for each step the positions contracted,
        the sizes brought and the order, each list preceded by its length.
        """
        numbers = [len(self.dims), *self.dims, len(self.steps)]
        for step in self.steps:
            for values in step:
                numbers += [len(values), *values]
        return numbers


def decode(numbers: Sequence[int]) -> Program:
    """The program that :meth:`Program.encode` wrote.

    Raises:
        ValueError: no such program.
    """
    place = 0

    def take() -> tuple[int, ...]:
        nonlocal place
        if place >= len(numbers):
            raise ValueError(f"chain: program ends too early: {list(numbers)}")
        count = numbers[place]
        found = tuple(numbers[place + 1 : place + 1 + count])
        if count < 0 or len(found) != count:
            raise ValueError(f"chain: program ends too early: {list(numbers)}")
        place += 1 + count
        return found

    dims = take()
    if place >= len(numbers):
        raise ValueError(f"chain: program ends too early: {list(numbers)}")
    count = numbers[place]
    place += 1
    program = Program(dims, tuple(Step(take(), take(), take()) for _ in range(count)))
    if place != len(numbers):
        raise ValueError(f"chain: program has {len(numbers) - place} numbers too many: {list(numbers)}")
    check(program)
    return program


def check(program: Program) -> None:
    """Raise ``ValueError`` unless sizes are positive, positions exist and every order is a permutation."""
    if not program.dims or not program.steps or min(program.dims) < 1:
        raise ValueError(f"chain: program needs dims >= 1 and at least one step, got {program}")
    for i, step in enumerate(program.steps):
        dims = program.dims_after(i)
        unique = len(set(step.contracted)) == len(step.contracted) >= 1
        if not unique or not all(0 <= place < len(dims) for place in step.contracted):
            raise ValueError(f"chain: step {i} must contract distinct dims of {dims}, got {step.contracted}")
        if any(size < 1 for size in step.new):
            raise ValueError(f"chain: step {i} must bring dims >= 1, got {step.new}")
        count = len(dims) - len(step.contracted) + len(step.new)
        if sorted(step.order) != list(range(count)):
            raise ValueError(f"chain: step {i} must order {count} dims, got {step.order}")
