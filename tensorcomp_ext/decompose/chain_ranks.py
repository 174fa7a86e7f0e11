"""Ranks of tensor trains and rings as users give them: read, checked, clipped to what can be used."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import SupportsIndex

from tensorcomp_ext._warnings import warn

ChainRanks = SupportsIndex | Sequence[SupportsIndex]


def _integer(value: object, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}")
    try:
        rank = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}") from None
    if rank < 1:
        raise ValueError(f"{name} must be at least 1, got {rank}")
    return rank


def _is_one(ranks: object) -> bool:
    return not isinstance(ranks, (tuple, list))


def _warn(name: str, given: Sequence[int], used: Sequence[int], uniform: bool) -> None:
    """One warning for ranks that were too large. A single int is a bound: one bond holding it is enough."""
    if list(given) == list(used) or (uniform and max(used) == given[0]):
        return
    shown = given[0] if uniform else tuple(given)
    text = f"{name} {shown} exceeds what the modes can hold; clipped to {tuple(used)}"
    warn(text)


def check_modes(name: str, argument: str, modes: Sequence[SupportsIndex], size: int) -> tuple[int, ...]:
    """`modes` as ints; ValueError unless they are positive and multiply to `size`."""
    checked = tuple(_integer(mode, f"{name}: {argument}") for mode in modes)
    if not checked or math.prod(checked) != size:
        raise ValueError(f"{name}: {argument} must multiply to {size}, got {checked}")
    return checked


def train_ranks(sizes: Sequence[int], ranks: ChainRanks, name: str = "tt: ranks") -> tuple[int, ...]:
    """The d − 1 inner ranks of a tensor train over modes of these `sizes`.

    `ranks` is one int for all bonds, the d − 1 inner ranks, or all d + 1 with ones at both ends. A bond R_k
    is clipped to the product of the modes on either side of it, and further to R_{k-1}·n_k and
    n_{k+1}·R_{k+1}, beyond which a core cannot have full rank. Clipping warns; for a single int only if no
    bond can hold it.

    Raises:
        TypeError, ValueError: anything else, or a rank below 1.
    """
    modes = len(sizes)
    if _is_one(ranks):
        inner = [_integer(ranks, name)] * (modes - 1)
    else:
        inner = [_integer(rank, name) for rank in ranks]  # type: ignore[union-attr]
        if len(inner) == modes + 1 and inner[0] == inner[-1] == 1:
            inner = inner[1:-1]
        if len(inner) != modes - 1:
            raise ValueError(
                f"{name} must be an int, {modes - 1} inner ranks, or {modes + 1} ranks that start and end "
                f"with 1, for {modes} modes, got {tuple(inner)}"
            )
    used = [1, *inner, 1]
    for k in range(1, modes):
        used[k] = min(used[k], used[k - 1] * sizes[k - 1])
    for k in range(modes - 1, 0, -1):
        used[k] = min(used[k], used[k + 1] * sizes[k])
    _warn(name, inner, used[1:-1], _is_one(ranks))
    return tuple(used[1:-1])


def largest_ring_rank(sizes: Sequence[int]) -> int:
    """The rank at which a uniform ring holds every tensor: the largest rank of a full tensor train."""
    total = math.prod(sizes)
    left = [math.prod(sizes[:k]) for k in range(1, len(sizes))]
    return max((min(part, total // part) for part in left), default=1)


def ring_ranks(sizes: Sequence[int], ranks: ChainRanks, name: str = "tr: ranks") -> tuple[int, ...]:
    """The d ranks (R_0 … R_{d-1}) of a tensor ring over modes of these `sizes`; core k is [R_k, n_k,
    R_{k+1}].

    `ranks` is one int for all bonds, or d ranks, or d + 1 of which the last repeats the first. A bond is
    clipped, with a warning, to R_{k-1}·n_{k-1} and n_k·R_{k+1}, beyond which a core cannot have full rank.
    Where all bonds exceed the largest rank of a full tensor train, at which a uniform ring holds every
    tensor, they are clipped to that.

    Raises:
        TypeError, ValueError: anything else, or a rank below 1.
    """
    modes = len(sizes)
    if _is_one(ranks):
        given = [_integer(ranks, name)] * modes
    else:
        given = [_integer(rank, name) for rank in ranks]  # type: ignore[union-attr]
        if len(given) == modes + 1 and given[0] == given[-1]:
            given = given[:-1]
        if len(given) != modes:
            raise ValueError(
                f"{name} must be an int or {modes} ranks (R_0 … R_{modes - 1}) for {modes} modes, "
                f"got {tuple(given)}"
            )
    largest = largest_ring_rank(sizes)
    used = [largest] * modes if min(given) > largest else list(given)
    previous: list[int] = []
    while used != previous:
        previous = list(used)
        for k in range(modes):
            after = (k + 1) % modes
            used[after] = min(used[after], used[k] * sizes[k])
        for k in reversed(range(modes)):
            used[k] = min(used[k], used[(k + 1) % modes] * sizes[k])
    _warn(name, given, used, False)
    return tuple(used)
