"""What TT-matrix and TR-matrix share: cores in a row, each with an out mode and an in mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ._modes import Folding
from ._network import NetworkFormat, Wiring


class MatrixChainFormat(NetworkFormat):
    """Cores ``[r, out_k, in_k, r']`` over pairs of modes of a matrix."""

    layers: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})
    paired = True
    closed: ClassVar[bool]
    """Whether the last rank is the first one again."""

    @classmethod
    def wire(cls, folding: Folding) -> Wiring:
        outs, ins = folding.out_modes, folding.in_modes
        count = len(outs)
        bonds = [2 * count + place for place in range(count + 1)]
        sizes = dict(enumerate(outs + ins))
        if cls.closed:
            bonds[-1] = bonds[0]
            ranks = tuple(bonds[:-1])
        else:
            sizes[bonds[0]] = sizes[bonds[-1]] = 1
            ranks = tuple(bonds[1:-1])
        return Wiring(
            names=tuple(f"core_{place}" for place in range(count)),
            labels=tuple((bonds[k], k, count + k, bonds[k + 1]) for k in range(count)),
            outputs=tuple(range(count)),
            inputs=tuple(count + place for place in folding.input_order),
            taps=(),
            sizes=sizes,
            ranks=ranks,
        )

    def macs(self, in_positions: int, out_positions: int) -> int:
        """A sweep over the in modes: step k of a row turns ``(R_{k-1}, I_k)`` into ``(J_k, R_k)``.

        It costs ``prod_{l<k} J_l R_{k-1} I_k J_k R_k prod_{l>k} I_l``; the rank that closes a ring is carried
        along.
        """
        ring = self.factors[0].shape[0]
        return out_positions * sweep_macs(self.factors, self.folding.out_modes, self.folding.in_modes, ring)


def sweep_macs(cores: Sequence[Tensor], outs: Sequence[int], ins: Sequence[int], ring: int = 1) -> int:
    """Multiply-adds of one row for core after core, the rank that closes a ring carried along between."""
    total = 0
    for k, core in enumerate(cores):
        carried = ring if 0 < k < len(cores) - 1 else 1
        total += carried * math.prod(outs[:k]) * core.numel() * math.prod(ins[k + 1 :])
    return total
