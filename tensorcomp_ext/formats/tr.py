"""Tensor ring: cores in a row that closes on itself, one mode each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..decompose import tensor_ring
from ._chains import ChainFormat, chained, ring_limits, without_last
from ._modes import Folding
from .base import register_format


@register_format("tr")
class TR(ChainFormat):
    """``W[n_0,...,n_{d-1}] = trace(G_0[:,n_0,:] G_1[:,n_1,:] ... G_{d-1}[:,n_{d-1},:])``.

    Modes are, in this order, of a matrix its out modes and in modes (three balanced ones a side by default),
    of a kernel its in modes, the merged taps and its out modes (S and T whole by default). Ranks are
    ``(R_0, ..., R_{d-1})``, R_0 closing the ring, with or without R_0 again at the end; an int is for all of
    them. Stored weights: ``sum_k R_k n_k R_{k+1}``, with one rank ``R^2 sum_k n_k``.

    Args:
        factors: cores ``core_k`` ``[R_k, n_k, R_{k+1}]``, R_d = R_0.
        shape: of the dense weight, ``[M, N]`` or ``[T, S, *kernel]``.
        in_modes, out_modes: the modes of columns and rows (input and output channels).
        input_order: of a matrix, the order in which the in modes index the columns, row-major.

    Options of ``from_dense``: ``method``, ``ridge``, ``sweeps``, ``tol``, ``restarts``, ``seed``; see
    :func:`..decompose.tensor_ring`.

    Raises:
        ValueError, TypeError: cores or modes that do not fit together.

    Source: Zhao et al. 2016; Wang et al. 2018.
    """

    closed = True
    method_options: ClassVar[frozenset[str]] = frozenset(
        {"method", "ridge", "sweeps", "tol", "restarts", "seed"}
    )

    @classmethod
    def limits(cls, folding: Folding) -> tuple[int, ...]:
        return ring_limits(cls.mode_sizes(folding))

    @classmethod
    def without_boundary(cls, ranks: tuple[int, ...], count: int) -> tuple[int, ...]:
        return without_last(ranks, count)

    @classmethod
    def decompose(
        cls, tensor: Tensor, folding: Folding, ranks: tuple[int, ...], **options: Any
    ) -> Sequence[Tensor]:
        return tensor_ring(chained(tensor, folding), ranks, **options).cores
