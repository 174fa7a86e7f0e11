"""Tensor train: cores in a row, one mode each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..decompose import masked_fit, tt_svd
from ._chains import ChainFormat, chained, two_sided_limits, without_ones
from ._modes import Folding
from .base import register_format


@register_format("tt")
class TT(ChainFormat):
    """``W[n_0,...,n_{d-1}] = G_0[:,n_0,:] G_1[:,n_1,:] ... G_{d-1}[:,n_{d-1},:]``, R_0 = R_d = 1.

    Modes are, in this order, of a matrix its out modes and in modes (three balanced ones a side by default),
    of a kernel its in modes, the merged taps and its out modes (S and T whole by default). Ranks are the
    d - 1 inner ones, with or without the two boundary ones; an int is the most that each may be. None exceeds
    the smaller product of the modes on its two sides. Stored weights: ``sum_k R_{k-1} n_k R_k``.

    Args:
        factors: cores ``core_k`` ``[R_k, n_k, R_{k+1}]``.
        shape: of the dense weight, ``[M, N]`` or ``[T, S, *kernel]``.
        in_modes, out_modes: the modes of columns and rows (input and output channels).
        input_order: of a matrix, the order in which the in modes index the columns, row-major.

    Raises:
        ValueError, TypeError: cores or modes that do not fit together.

    Source: Oseledets 2011; Novikov et al. 2015.
    """

    closed = False

    @classmethod
    def limits(cls, folding: Folding) -> tuple[int, ...]:
        return two_sided_limits(cls.mode_sizes(folding))

    @classmethod
    def without_boundary(cls, ranks: tuple[int, ...], count: int) -> tuple[int, ...]:
        return without_ones(ranks, count)

    @classmethod
    def decompose(
        cls, tensor: Tensor, folding: Folding, ranks: tuple[int, ...], **options: Any
    ) -> Sequence[Tensor]:
        """TT-SVD."""
        return tt_svd(chained(tensor, folding), ranks).cores

    @classmethod
    def decompose_observed(
        cls, tensor: Tensor, observed: Tensor, folding: Folding, ranks: tuple[int, ...], **search: Any
    ) -> Sequence[Tensor]:
        return masked_fit(chained(tensor, folding), chained(observed, folding), "tt", ranks, **search).factors
