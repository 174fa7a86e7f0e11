"""TR-matrix: cores with an out mode and an in mode each, in a ring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..decompose import tr_matrix
from ._chains import ring_limits, without_last
from ._matrix_chains import MatrixChainFormat
from ._modes import Folding
from .base import register_format
from .forms import Network


@register_format("tr_matrix")
class TRMatrix(MatrixChainFormat):
    """``W[(o_1...o_d), (i_1...i_d)] = trace(G_1[:,o_1,i_1,:] ... G_d[:,o_d,i_d,:])``: TTM with a closed ring.

    Modes come in pairs, three by default, balanced. Rows may be padded: of ``prod(out_modes) >= M`` the first
    M count, as vocabularies need. Ranks are ``(R_0, ..., R_{d-1})``, R_0 closing the ring, with or without
    R_0 again at the end; an int is for all of them. Stored weights: ``sum_k R_{k-1} J_k I_k R_k``.

    Args:
        factors: cores ``core_k`` ``[R_k, out_k, in_k, R_{k+1}]``, R_d = R_0.
        shape: of the dense weight, ``[M, N]``.
        in_modes, out_modes: the modes of columns and rows, as many of both.
        input_order: the order in which the in modes index the columns, row-major.

    Options of ``from_dense``: ``method``, ``ridge``, ``sweeps``, ``tol``, ``restarts``, ``seed``; see
    :func:`..decompose.tr_matrix`.

    Raises:
        ValueError, TypeError: cores or modes that do not fit together.

    Source: Zhao et al. 2016; Novikov et al. 2015 (pairs of modes).
    """

    closed = True
    method_options: ClassVar[frozenset[str]] = frozenset(
        {"method", "ridge", "sweeps", "tol", "restarts", "seed"}
    )

    @classmethod
    def limits(cls, folding: Folding) -> tuple[int, ...]:
        return ring_limits([o * i for o, i in zip(folding.out_modes, folding.in_modes, strict=True)])

    @classmethod
    def without_boundary(cls, ranks: tuple[int, ...], count: int) -> tuple[int, ...]:
        return without_last(ranks, count)

    @classmethod
    def decompose(
        cls, tensor: Tensor, folding: Folding, ranks: tuple[int, ...], **options: Any
    ) -> Sequence[Tensor]:
        outs, ins = folding.out_modes, folding.in_modes
        return tr_matrix(tensor.reshape(math.prod(outs), -1), ranks, outs, ins, **options).cores

    def lower(self) -> Network:
        return self.network()
