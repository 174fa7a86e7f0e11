"""Folding the rows and columns of a weight into modes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .._names import nearest

MOST_MODES = 20
"""A side: a contraction spells every mode and rank with a letter of its own."""


@lru_cache(maxsize=4096)
def balanced_modes(size: int, count: int) -> tuple[int, ...]:
    """``size`` as a product of ``count`` factors as equal as its divisors allow, ascending.

    >>> balanced_modes(768, 3), balanced_modes(3072, 3), balanced_modes(14, 3)
    ((8, 8, 12), (12, 16, 16), (1, 2, 7))
    """
    if size < 1 or count < 1:
        raise ValueError(f"balanced_modes: size and count must be at least 1, got {size} and {count}")
    return min(_factorizations(size, count, 1), key=lambda modes: (sum(modes), max(modes)))


def _factorizations(size: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    """Ascending factorizations into ``count`` factors of at least ``least``."""
    if count == 1:
        yield (size,)
        return
    for first in range(least, int(round(size ** (1 / count), 9)) + 1):
        if size % first == 0:
            for rest in _factorizations(size // first, count - 1, first):
                yield (first, *rest)


def covering_modes(size: int, count: int) -> tuple[int, ...]:
    """``count`` nearly equal modes, ascending, whose product is ``size`` or little more.

    For vocabularies, which have few divisors and are padded up.

    >>> covering_modes(17200, 3), covering_modes(32768, 3)
    ((26, 26, 26), (32, 32, 32))
    """
    if size < 1 or count < 1:
        raise ValueError(f"covering_modes: size and count must be at least 1, got {size} and {count}")
    modes: list[int] = []
    rest = size
    for left in range(count, 0, -1):
        modes.append(math.ceil(round(rest ** (1 / left), 9)))
        rest = -(-rest // modes[-1])
    return tuple(sorted(modes))


@dataclass(frozen=True)
class Folding:
    """A dense shape and the modes into which its rows and columns are folded.

    A kernel ``[T, S, *kernel]`` folds T and S; a matrix ``[M, N]`` its rows M (out modes) and columns N.
    """

    shape: tuple[int, ...]
    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    input_order: tuple[int, ...]
    """``in_modes[input_order[0]], in_modes[input_order[1]], ...`` index the columns row-major."""

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def structure(self) -> dict[str, list[int]]:
        """What :func:`fold` needs beside the shape, in JSON types."""
        found = {"in_modes": list(self.in_modes), "out_modes": list(self.out_modes)}
        if self.input_order != tuple(range(len(self.in_modes))):
            found["input_order"] = list(self.input_order)
        return found

    def tensor(self, weight: Tensor) -> Tensor:
        """The dense weight with modes ``(*out_modes, *in_modes, *kernel)``, rows padded with zeros."""
        missing = math.prod(self.out_modes) - self.shape[0]
        if missing:
            weight = F.pad(weight, (0, 0) * (weight.dim() - 1) + (0, missing))
        stored = [self.in_modes[place] for place in self.input_order]
        folded = weight.reshape(*self.out_modes, *stored, *self.kernel)
        count = len(self.out_modes)
        inverse = [count + self.input_order.index(place) for place in range(len(self.in_modes))]
        last = range(count + len(stored), folded.dim())
        return folded.permute(*range(count), *inverse, *last)


def fold(
    name: str,
    shape: Sequence[int],
    count: int,
    *,
    paired: bool = False,
    padded: bool = False,
    in_modes: Sequence[int] | None = None,
    out_modes: Sequence[int] | None = None,
    input_order: Sequence[int] | None = None,
    **unknown: Any,
) -> Folding:
    """The folding of a dense ``shape``.

    Args:
        name: of the format, for messages.
        count: modes a side of a matrix where none are given, balanced; the channels of a kernel stay whole.
        paired: out and in modes come in pairs: the shorter side is filled up with modes of size 1 in front.
        padded: the out modes may have more rows than the matrix.
        in_modes, out_modes: modes; None for the default.
        input_order: the order in which the in modes index the columns, row-major; None for their own.

    Raises:
        ValueError: modes that do not fold the shape. TypeError: an unknown option.
    """
    if unknown:
        option = next(iter(unknown))
        near = nearest(option, ("in_modes", "out_modes", "input_order"))
        raise TypeError(f"{name}: unknown option {option!r}{near}")
    if not 2 <= len(shape) <= 5 or min(shape) < 1:
        raise ValueError(f"{name}: shape must be [M, N] or [T, S, *kernel], got {list(shape)}")
    sides = []
    given = (("out_modes", out_modes, shape[0]), ("in_modes", in_modes, shape[1]))
    for argument, modes, size in given:
        if modes is not None:
            sides.append(_given(name, argument, modes, size, padded and argument == "out_modes"))
        elif len(shape) > 2:
            sides.append((size,))
        else:
            sides.append(tuple(mode for mode in balanced_modes(size, count) if mode > 1) or (1,))
    outs, ins = sides
    if paired and len(outs) != len(ins):
        if in_modes is not None and out_modes is not None:
            raise ValueError(
                f"{name}: out_modes and in_modes must be as many, got {list(outs)} and {list(ins)}"
            )
        outs, ins = _paired(outs, ins, shape, (out_modes is None, in_modes is None))
    order = tuple(range(len(ins))) if input_order is None else tuple(input_order)
    if sorted(order) != list(range(len(ins))):
        raise ValueError(
            f"{name}: input_order must be a permutation of {list(range(len(ins)))}, got {list(order)}"
        )
    if len(shape) > 2 and order != tuple(range(len(ins))):
        raise ValueError(f"{name}: input_order is for matrices, got a kernel {list(shape)}")
    return Folding(tuple(shape), outs, ins, order)


def _given(name: str, argument: str, modes: Sequence[int], size: int, padded: bool) -> tuple[int, ...]:
    if isinstance(modes, (str, int)) or any(type(mode) is not int or mode < 1 for mode in modes) or not modes:
        raise ValueError(f"{name}: {argument} must be a tuple of ints >= 1, such as (4, 4), got {modes!r}")
    if len(modes) > MOST_MODES:
        raise ValueError(f"{name}: {argument} must be at most {MOST_MODES} modes, got {len(modes)}")
    found = math.prod(modes)
    if found != size and not (padded and found > size):
        least = "at least " if padded else ""
        raise ValueError(
            f"{name}: {argument} must have the product {least}{size}, got {list(modes)} ({found})"
        )
    return tuple(modes)


def _paired(
    outs: tuple[int, ...], ins: tuple[int, ...], shape: Sequence[int], free: tuple[bool, bool]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sides of equal length: a side that is free is folded anew into as many modes as the other has."""
    if free == (True, True) or len(shape) > 2:
        length = max(len(outs), len(ins))
        return (1,) * (length - len(outs)) + outs, (1,) * (length - len(ins)) + ins
    if free[0]:
        return balanced_modes(shape[0], len(ins)), ins
    return outs, balanced_modes(shape[1], len(outs))
