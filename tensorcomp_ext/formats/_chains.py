"""What tensor train and tensor ring share: cores in a row, one mode each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ._modes import Folding
from ._network import NetworkFormat, Part, Wiring
from .forms import BottleneckConv, Network


class ChainFormat(NetworkFormat):
    """Cores ``[r, n, r']``, of a matrix over out modes, then in modes.

    Of a kernel they are over in modes, taps (merged into one mode) and out modes.
    """

    layers: ClassVar[frozenset[str]] = frozenset({"conv", "linear"})
    closed: ClassVar[bool]
    """Whether the last rank is the first one again."""

    @classmethod
    def mode_sizes(cls, folding: Folding) -> tuple[int, ...]:
        """Sizes of the cores' modes."""
        if folding.kernel:
            return (*folding.in_modes, folding.taps, *folding.out_modes)
        return folding.out_modes + folding.in_modes

    @classmethod
    def wire(cls, folding: Folding) -> Wiring:
        modes = cls.mode_sizes(folding)
        count, ins, outs = len(modes), len(folding.in_modes), len(folding.out_modes)
        bonds = [count + place for place in range(count + 1)]
        sizes = dict(enumerate(modes))
        if cls.closed:
            bonds[-1] = bonds[0]
            ranks = tuple(bonds[:-1])
        else:
            sizes[bonds[0]] = sizes[bonds[-1]] = 1
            ranks = tuple(bonds[1:-1])
        first_in = 0 if folding.kernel else outs
        first_out = count - outs if folding.kernel else 0
        return Wiring(
            names=tuple(f"core_{place}" for place in range(count)),
            labels=tuple((bonds[place], place, bonds[place + 1]) for place in range(count)),
            outputs=tuple(range(first_out, first_out + outs)),
            inputs=tuple(first_in + place for place in folding.input_order),
            taps=(ins,) if folding.kernel else (),
            sizes=sizes,
            ranks=ranks,
        )

    @classmethod
    def parts(cls, folding: Folding, wiring: Wiring) -> dict[str, Part]:
        if not folding.kernel:
            return {}
        labels, ins = wiring.labels, len(folding.in_modes)
        before, after = tuple(range(ins)), tuple(range(ins + 1, len(labels)))
        ring = (labels[0][0],) if cls.closed else ()
        return {
            "in": Part(before, (*wiring.inputs, *ring, labels[ins][0])),  # [S modes, ring, A]
            "out": Part(after, (*wiring.outputs, *ring, labels[ins][2])),  # [T modes, ring, B]
        }

    def _middle_ranks(self) -> tuple[int, int, int]:
        """Ring rank, and the ranks between in modes and out modes: before and after the taps of a kernel."""
        cores = self.factors
        before = len(self.folding.in_modes) if self.folding.kernel else len(self.folding.out_modes)
        ring = cores[0].shape[0]
        return ring, cores[before].shape[0], cores[before].shape[2]

    def macs(self, in_positions: int, out_positions: int) -> int:
        """Of a matrix ``rows R_0 R_m (M + N)``, of a kernel ``HW S R_0 A + H'W' R_0 B (prod(k) A + T)``.

        R_m is the rank between out modes and in modes, where a matrix parts into two merged factors; A and B
        are the ranks before and after the taps. R_0 of a train is 1. The merges are not counted.
        """
        ring, a, b = self._middle_ranks()
        rows, columns, taps = self.shape[0], self.shape[1], self.folding.taps
        if not self.folding.kernel:
            return ring * a * (in_positions * columns + out_positions * rows)
        return in_positions * columns * ring * a + out_positions * ring * b * (taps * a + rows)

    def lower(self) -> BottleneckConv | Network:
        folding = self.folding
        if not folding.kernel:
            return self.network()
        taps = self.factors[len(folding.in_modes)]  # [A, taps, B]
        ring = self.factors[0].shape[0]
        return BottleneckConv(
            self.merged("in", (folding.shape[1], -1)),
            taps.permute(2, 0, 1).unflatten(2, folding.kernel),
            self.merged("out", (folding.shape[0], -1)),
            ring=ring,
        )


def chained(tensor: Tensor, folding: Folding) -> Tensor:
    """A tensor ``(*out_modes, *in_modes, *kernel)`` in the order of a chain's cores."""
    if not folding.kernel:
        return tensor
    outs = len(folding.out_modes)
    merged = tensor.flatten(outs + len(folding.in_modes))  # [*out modes, *in modes, taps]
    return merged.permute(*range(outs, merged.dim()), *range(outs))


def two_sided_limits(modes: Sequence[int]) -> tuple[int, ...]:
    """Largest rank of every inner bond of a train over these modes: the smaller product of its sides."""
    return tuple(min(math.prod(modes[:place]), math.prod(modes[place:])) for place in range(1, len(modes)))


def without_ones(ranks: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Ranks of a train without the boundary ones, if they were given."""
    return ranks[1:-1] if len(ranks) == count + 2 and ranks[0] == ranks[-1] == 1 else ranks


def without_last(ranks: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Ranks of a ring without the last one, if the first was repeated."""
    return ranks[:-1] if len(ranks) == count + 1 and ranks[0] == ranks[-1] else ranks


def ring_limits(modes: Sequence[int]) -> tuple[int, ...]:
    """Bounds of a ring's ranks, the entries of the tensor; a single core closes on itself at rank 1."""
    return (math.prod(modes) if len(modes) > 1 else 1,) * len(modes)
