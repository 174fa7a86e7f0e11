"""CP: a weight as a sum of outer products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..decompose import cp_als, masked_fit
from ._modes import Folding
from ._network import NetworkFormat, Part, Wiring
from .base import Rank, register_format
from .forms import BottleneckConv, Network


@register_format("cp")
class CP(NetworkFormat):
    """``W[n_0,...,n_{d-1}] = sum_r U_0[n_0,r] U_1[n_1,r] ... U_{d-1}[n_{d-1},r]``.

    Modes are the out modes, the in modes and the modes of the kernel, in this order, as tensorly has them:
    ``(T, S, kH, kW)`` of a kernel, two balanced modes a side of a matrix by default. The rank is one int, at
    most the product of all modes but the largest. Stored weights: ``R sum_k n_k``.

    Args:
        factors: ``factor_k`` ``[n_k, R]``.
        shape: of the dense weight, ``[M, N]`` or ``[T, S, *kernel]``.
        in_modes, out_modes: the modes of columns and rows (input and output channels).
        input_order: of a matrix, the order in which the in modes index the columns, row-major.

    Options of ``from_dense``: ``restarts``, ``sweeps``, ``tol``, ``seed``; see :func:`..decompose.cp_als`.

    Raises:
        ValueError, TypeError: factors or modes that do not fit together.

    Source: Hitchcock 1927; Lebedev et al. 2015 (kernels).
    """

    layers: ClassVar[frozenset[str]] = frozenset({"conv", "linear"})
    modes_a_side = 2
    method_options: ClassVar[frozenset[str]] = frozenset({"restarts", "sweeps", "tol", "seed"})

    @classmethod
    def wire(cls, folding: Folding) -> Wiring:
        modes = folding.out_modes + folding.in_modes + folding.kernel
        outs, channels, count = len(folding.out_modes), len(modes) - len(folding.kernel), len(modes)
        return Wiring(
            names=tuple(f"factor_{place}" for place in range(count)),
            labels=tuple((place, count) for place in range(count)),
            outputs=tuple(range(outs)),
            inputs=tuple(outs + place for place in folding.input_order),
            taps=tuple(range(channels, count)),
            sizes=dict(enumerate(modes)),
            ranks=(count,),
        )

    @classmethod
    def parts(cls, folding: Folding, wiring: Wiring) -> dict[str, Part]:
        if not folding.kernel:
            return {}
        (rank,) = wiring.ranks
        return {
            "in": Part(wiring.inputs, (*wiring.inputs, rank)),
            "taps": Part(wiring.taps, (rank, *wiring.taps)),
            "out": Part(wiring.outputs, (*wiring.outputs, rank)),
        }

    @classmethod
    def limits(cls, folding: Folding) -> tuple[int, ...]:
        modes = folding.out_modes + folding.in_modes + folding.kernel
        return (math.prod(modes) // max(modes),)

    @classmethod
    def packed(cls, ranks: tuple[int, ...]) -> Rank:
        return ranks[0]

    @classmethod
    def decompose(
        cls, tensor: Tensor, folding: Folding, ranks: tuple[int, ...], **options: Any
    ) -> Sequence[Tensor]:
        return cp_als(tensor, ranks[0], **options).factors

    @classmethod
    def decompose_observed(
        cls, tensor: Tensor, observed: Tensor, folding: Folding, ranks: tuple[int, ...], **search: Any
    ) -> Sequence[Tensor]:
        return masked_fit(tensor, observed, "cp", ranks[0], **search).factors

    @property
    def tap_factors(self) -> tuple[Tensor, ...]:
        """The factors of the kernel's modes, ``[k, R]`` each."""
        return tuple(self.factors[place] for place in self.wiring.taps)

    def macs(self, in_positions: int, out_positions: int) -> int:
        """``HW S R + H'W' R (prod(k) + T)``, the taps merged to one depthwise core; ``rows R (M + N)``."""
        taps = self.folding.taps if self.folding.kernel else 0
        rows, columns = self.shape[:2]
        return self.ranks[0] * (in_positions * columns + out_positions * (taps + rows))

    def lower(self) -> BottleneckConv | Network:
        folding = self.folding
        if not folding.kernel:
            return self.network()
        return BottleneckConv(
            self.merged("in", (folding.shape[1], -1)),
            self.merged("taps", (-1, 1, *folding.kernel)),
            self.merged("out", (folding.shape[0], -1)),
            depthwise=True,
        )
