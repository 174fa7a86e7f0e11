"""Tucker: a core compressed in all modes of the folded weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..decompose import masked_fit, tucker
from ._modes import Folding
from ._network import NetworkFormat, Part, Wiring
from .base import register_format
from .forms import BottleneckConv, Network


@register_format("tucker")
class Tucker(NetworkFormat):
    """``W[n_0,...,n_{d-1}] = sum_r C[r_0,...,r_{d-1}] U_0[n_0,r_0] ... U_{d-1}[n_{d-1},r_{d-1}]``.

    Modes are the out modes, the in modes and the modes of the kernel, in this order: ``(T, S, kH, kW)`` of a
    kernel, two balanced modes a side of a matrix by default. One rank a mode, at most its size; an int is the
    most that each may be. Stored weights: ``prod_k R_k + sum_k n_k R_k``.

    Args:
        factors: ``core`` ``[R_0, ..., R_{d-1}]``, then ``factor_k`` ``[n_k, R_k]``.
        shape: of the dense weight, ``[M, N]`` or ``[T, S, *kernel]``.
        in_modes, out_modes: the modes of columns and rows (input and output channels).
        input_order: of a matrix, the order in which the in modes index the columns, row-major.

    Options of ``from_dense``: ``method``; see :func:`..decompose.tucker`.

    Raises:
        ValueError, TypeError: factors or modes that do not fit together.

    Source: Tucker 1966; De Lathauwer et al. 2000.
    """

    layers: ClassVar[frozenset[str]] = frozenset({"conv", "linear"})
    modes_a_side = 2
    method_options: ClassVar[frozenset[str]] = frozenset({"method"})

    @classmethod
    def wire(cls, folding: Folding) -> Wiring:
        modes = folding.out_modes + folding.in_modes + folding.kernel
        outs, channels, count = len(folding.out_modes), len(modes) - len(folding.kernel), len(modes)
        ranks = tuple(range(count, 2 * count))
        return Wiring(
            names=("core", *(f"factor_{place}" for place in range(count))),
            labels=(ranks, *((place, count + place) for place in range(count))),
            outputs=tuple(range(outs)),
            inputs=tuple(outs + place for place in folding.input_order),
            taps=tuple(range(channels, count)),
            sizes=dict(enumerate(modes)),
            ranks=ranks,
        )

    @classmethod
    def parts(cls, folding: Folding, wiring: Wiring) -> dict[str, Part]:
        if not folding.kernel:
            return {}
        ranks, outs, ins, taps = wiring.ranks, wiring.outputs, wiring.inputs, wiring.taps
        out_ranks, in_ranks = tuple(ranks[k] for k in outs), tuple(ranks[k] for k in ins)
        return {  # factor k stands behind the core
            "in": Part(tuple(1 + k for k in ins), (*ins, *in_ranks)),
            "core": Part((0, *(1 + k for k in taps)), (*out_ranks, *in_ranks, *taps)),
            "out": Part(tuple(1 + k for k in outs), (*outs, *out_ranks)),
        }

    @classmethod
    def limits(cls, folding: Folding) -> tuple[int, ...]:
        return folding.out_modes + folding.in_modes + folding.kernel

    @classmethod
    def decompose(
        cls, tensor: Tensor, folding: Folding, ranks: tuple[int, ...], **options: Any
    ) -> Sequence[Tensor]:
        found = tucker(tensor, ranks, **options)
        return [found.core, *found.factors]

    @classmethod
    def decompose_observed(
        cls, tensor: Tensor, observed: Tensor, folding: Folding, ranks: tuple[int, ...], **search: Any
    ) -> Sequence[Tensor]:
        return masked_fit(tensor, observed, "tucker", ranks, **search).factors

    def _side_ranks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ranks of the out modes and of the in modes."""
        outs, ins = len(self.folding.out_modes), len(self.folding.in_modes)
        return self.ranks[:outs], self.ranks[outs : outs + ins]

    def macs(self, in_positions: int, out_positions: int) -> int:
        """Of a kernel those of Tucker-2 with the taps merged into the core.

        Of a matrix the factors of the in modes one after another, the core, and the factors of the out modes.
        """
        folding, (out_ranks, in_ranks) = self.folding, self._side_ranks()
        a, b = math.prod(in_ranks), math.prod(out_ranks)
        if folding.kernel:
            last = b * (folding.taps * a + self.shape[0])
            return in_positions * self.shape[1] * a + out_positions * last
        ins, outs = folding.in_modes, folding.out_modes
        shrink = sum(math.prod(in_ranks[: k + 1]) * math.prod(ins[k:]) for k in range(len(ins)))
        grow = sum(math.prod(outs[: k + 1]) * math.prod(out_ranks[k:]) for k in range(len(outs)))
        return in_positions * shrink + out_positions * (a * b + grow)

    def lower(self) -> BottleneckConv | Network:
        folding = self.folding
        if not folding.kernel:
            return self.network()
        out_ranks, in_ranks = self._side_ranks()
        return BottleneckConv(
            self.merged("in", (folding.shape[1], -1)),
            self.merged("core", (math.prod(out_ranks), math.prod(in_ranks), *folding.kernel)),
            self.merged("out", (folding.shape[0], -1)),
        )
