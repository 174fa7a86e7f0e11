"""TT-matrix: cores with an out mode and an in mode each, in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..decompose import masked_fit, tt_svd, ttm_svd
from ._chains import two_sided_limits, without_ones
from ._matrix_chains import MatrixChainFormat, sweep_macs
from ._modes import Folding
from ._network import Wiring
from .base import register_format
from .forms import Network, TapNetwork


@register_format("ttm")
class TTM(MatrixChainFormat):
    """``W[(o_1...o_d), (i_1...i_d)] = G_1[:,o_1,i_1,:] ... G_d[:,o_d,i_d,:]``, first and last rank being 1.

    Of a kernel ``W[t,s,k] = G_0[k,:] G_1[:,s_1,t_1,:] ... G_d[:,s_d,t_d,:]`` with the taps merged.

    Modes come in pairs, three by default, balanced (of a kernel S and T whole). Rows of a matrix may be
    padded: of ``prod(out_modes) >= M`` the first M count, as vocabularies need. Ranks are the ones between
    the cores, with or without the boundary ones; an int is the most that each may be. None exceeds the
    smaller product of the modes on its two sides. Stored weights: ``sum_k R_{k-1} J_k I_k R_k``, of a kernel
    ``prod(k) R_0`` more.

    Args:
        factors: cores ``core_k`` ``[R_k, out_k, in_k, R_{k+1}]``; of a kernel ``core_0`` ``[taps, R_0]``,
            then ``core_k`` ``[R_{k-1}, in_k, out_k, R_k]``.
        shape: of the dense weight, ``[M, N]`` or ``[T, S, *kernel]``.
        in_modes, out_modes: the modes of columns and rows (input and output channels), as many of both.
        input_order: of a matrix, the order in which the in modes index the columns, row-major.

    Raises:
        ValueError, TypeError: cores or modes that do not fit together.

    Source: Novikov et al. 2015; Garipov et al. 2016 (kernels).
    """

    layers: ClassVar[frozenset[str]] = frozenset({"conv", "linear", "embedding"})
    closed = False

    @classmethod
    def wire(cls, folding: Folding) -> Wiring:
        wiring = super().wire(folding)
        if not folding.kernel:
            return wiring
        count = len(folding.out_modes)
        tap, ranks = 4 * count, wiring.labels[0][0]
        swapped = [(before, i, o, after) for before, o, i, after in wiring.labels]
        sizes = {label: size for label, size in wiring.sizes.items() if label != ranks}
        return Wiring(
            names=tuple(f"core_{place}" for place in range(count + 1)),
            labels=((tap, ranks), *swapped),
            outputs=wiring.outputs,
            inputs=wiring.inputs,
            taps=(tap,),
            sizes={**sizes, tap: folding.taps},
            ranks=(ranks, *wiring.ranks),
        )

    @classmethod
    def limits(cls, folding: Folding) -> tuple[int, ...]:
        pairs = [o * i for o, i in zip(folding.out_modes, folding.in_modes, strict=True)]
        return two_sided_limits([folding.taps, *pairs] if folding.kernel else pairs)

    @classmethod
    def without_boundary(cls, ranks: tuple[int, ...], count: int) -> tuple[int, ...]:
        return without_ones(ranks, count)

    @classmethod
    def decompose(
        cls, tensor: Tensor, folding: Folding, ranks: tuple[int, ...], **options: Any
    ) -> Sequence[Tensor]:
        """TT-SVD over the pairs of modes."""
        outs, ins = folding.out_modes, folding.in_modes
        if not folding.kernel:
            return ttm_svd(tensor.reshape(math.prod(outs), -1), ranks, outs, ins).cores
        taps, *cores = tt_svd(_by_pairs(tensor, folding), ranks).cores
        split = [core.unflatten(1, (i, o)) for core, i, o in zip(cores, ins, outs, strict=True)]
        return [taps[0], *split]

    @classmethod
    def decompose_observed(
        cls, tensor: Tensor, observed: Tensor, folding: Folding, ranks: tuple[int, ...], **search: Any
    ) -> Sequence[Tensor]:
        outs, ins = folding.out_modes, folding.in_modes
        if not folding.kernel:
            rows = math.prod(outs)
            matrix, seen = tensor.reshape(rows, -1), observed.reshape(rows, -1)
            return masked_fit(matrix, seen, "ttm", ranks, out_modes=outs, in_modes=ins, **search).factors
        pairs, seen = _by_pairs(tensor, folding), _by_pairs(observed, folding)
        taps, *cores = masked_fit(pairs, seen, "tt", ranks, **search).factors
        split = [core.unflatten(1, (i, o)) for core, i, o in zip(cores, ins, outs, strict=True)]
        return [taps[0], *split]

    def macs(self, in_positions: int, out_positions: int) -> int:
        """A sweep over the in modes, as of every chain of pairs.

        Of a kernel ``H'W' S prod(k) R_0`` for the taps, then the sweep at every output position.
        """
        if not self.folding.kernel:
            return super().macs(in_positions, out_positions)
        folding, (taps, *cores) = self.folding, self.factors
        sweep = sweep_macs(cores, folding.out_modes, folding.in_modes)
        return out_positions * (folding.shape[1] * taps.numel() + sweep)

    def lower(self) -> Network | TapNetwork:
        if not self.folding.kernel:
            return self.network()
        wiring, (taps, *cores) = self.wiring, self.factors
        rank = wiring.labels[0][1]
        network = Network(tuple(cores), wiring.labels[1:], wiring.outputs, (rank, *wiring.inputs))
        return TapNetwork(taps.t().unflatten(1, self.folding.kernel), network)


def _by_pairs(tensor: Tensor, folding: Folding) -> Tensor:
    """A kernel ``(*out_modes, *in_modes, *kernel)`` as ``[taps, in_1 out_1, in_2 out_2, ...]``."""
    outs, ins = folding.out_modes, folding.in_modes
    count = len(outs)
    channels = [place for k in range(count) for place in (count + k, k)]
    taps_first = tensor.flatten(2 * count).permute(2 * count, *channels)  # [taps, in_1, out_1, ...]
    return taps_first.reshape(folding.taps, *(i * o for i, o in zip(ins, outs, strict=True)))
