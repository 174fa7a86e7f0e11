"""Low-rank + sparse: a weight in a low-rank format and a dense matrix of which a mask keeps some entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..ops import pack_mask, pack_sparse, unpack_mask
from ..ops.lowrank_sparse_packing import positions_bytes
from ..ops.lowrank_sparse_weight import tried_weight
from ._sparse import LowRankOptions, SparseFormat, check_sparse
from .base import Format, Rank, as_parameter, register_format
from .forms import SparseSum
from .packed_sparse import PackedLowRankSparse

MODES = ("additive", "masking")
OPTIONS = frozenset(
    {"low_rank", "mode", "init", "outliers", "iterations", "tol", "nnz", "density", "positions"}
)
"""Options of weights with a sparse part; others are those of the format of the low-rank one."""


@register_format("lowrank_sparse")
class LowRankSparse(SparseFormat):
    """``W = L + M * S`` ("additive") or ``W = (1 - M) * L + M * S`` ("masking"), M being 0 or 1.

    The form for training. L is a weight in another format, S as large as the dense weight, M one bit an
    entry. Ranks and their options are those of L. As it stands this stores more than the dense weight; once
    training has pruned S, :meth:`finalized` stores the factors and the entries that are left. Stored weights:
    ``numel(L) + M N``.

    Args:
        low_rank: L; None for ``W = M * S``.
        sparse: S, ``[M, N]`` or ``[T, S, *kernel]``; it is held as the matrix ``[T, S K]``, which no memory
            format changes.
        mask: bool of the weight's shape; None keeps every entry.
        mode: "additive" or "masking".
        shape: of the dense weight; None for that of ``sparse``.

    Options of the classmethods: ``low_rank``, the name of L's format ("svd" of a matrix, "tucker2" of a
    kernel where it is not given, "none" for no such part; "svd" takes a kernel as ``[T, S K]``), ``mode``,
    and those of that format. Options of :meth:`from_dense`: ``init``, ``outliers``, ``iterations``, ``tol``.

    Raises:
        ValueError, TypeError: parts that do not fit together.

    Source: Hawkins et al. 2021 (low-rank + sparse tensor compression).
    """

    kept_names: ClassVar[tuple[str, ...]] = ("sparse",)
    buffer_names: ClassVar[tuple[str, ...]] = ("mask",)
    shrinks = False
    sparse: nn.Parameter
    mask: Tensor

    def __init__(
        self,
        low_rank: Format | None,
        sparse: Tensor,
        mask: Tensor | None = None,
        *,
        mode: Literal["additive", "masking"] = "additive",
        shape: Sequence[int] | None = None,
    ) -> None:
        check_sparse(self.name, sparse, low_rank)
        super().__init__(low_rank, sparse.shape if shape is None else shape)
        if sparse.numel() != math.prod(self.shape):
            raise ValueError(f"{self.name}: sparse must be {list(self.shape)}, got {list(sparse.shape)}")
        matrix = sparse if tuple(sparse.shape) == self.matrix_shape else sparse.reshape(self.matrix_shape)
        self.sparse, self.mode = as_parameter(matrix), _checked_mode(self.name, mode)
        kept = torch.ones(self.shape, dtype=torch.bool, device=sparse.device) if mask is None else mask
        self.register_buffer("mask", self._bits(kept))

    # --- the mask ------------------------------------------------------------------------------------------

    def _bits(self, kept: Tensor) -> Tensor:
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            given = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
            raise TypeError(f"{self.name}: mask must be a bool tensor, got {given}")
        if kept.shape != self.shape:
            raise ValueError(f"{self.name}: mask must be {list(self.shape)}, got {list(kept.shape)}")
        return pack_mask(kept.reshape(self.matrix_shape))

    @property
    def kept(self) -> Tensor:
        """M as bools of the weight's shape."""
        return unpack_mask(self.mask, self.matrix_shape[1]).reshape(self.shape)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Set M.

        Args:
            kept: bool of the weight's shape.

        Raises:
            ValueError, TypeError: a mask of another shape or dtype.
        """
        self.mask.copy_(self._bits(kept))

    @property
    def nnz(self) -> int:
        """Entries of S that M keeps; of a weight on the meta device all. Waits for an accelerator."""
        return math.prod(self.shape) if self.mask.is_meta else int(self.kept.sum())

    @property
    def stored_bytes(self) -> int:
        low = 0 if self.low_rank is None else self.low_rank.numel
        nnz = self.nnz
        return (low + nnz) * self.sparse.element_size() + positions_bytes(*self.matrix_shape, nnz)

    # --- the weight ----------------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """W; cost :meth:`rebuild_macs`. What M hides of S is not looked at and has no gradient."""
        pair = self.factor_pair()
        if pair is not None:
            found = tried_weight(pair.a, pair.b, self.sparse, self.mask, mode=self.mode)
            return found.reshape(self.shape)
        low, sparse = self.low_rank_dense(), self.sparse.reshape(self.shape)
        if low is None:
            m, n = self.matrix_shape
            nothing = (sparse.new_empty(m, 0), sparse.new_empty(0, n))
            return tried_weight(*nothing, self.sparse, self.mask, mode="additive").reshape(self.shape)
        if self.mode == "masking":
            return torch.where(self.kept, sparse, low)
        return low + torch.where(self.kept, sparse, 0)

    def lower(self) -> SparseSum:
        low = None if self.low_rank is None else self.low_rank.lower()
        return SparseSum(low, self.sparse, self.mask, self.mode == "masking")

    @torch.no_grad()
    def finalized(self) -> PackedLowRankSparse:
        """The weight packed for inference, in memory of its own.

        Mode "masking" becomes additive: ``(1 - M) * L + M * S = L + M * (S - L)``. ``S - L`` is rounded to
        the weight's dtype, and so is its sum with L: what M keeps moves by up to ``eps (|L| + |S|)``, which
        is much for entries of S that are far smaller than L's. Nothing else moves.
        """
        sparse, low = self.sparse.detach(), self.low_rank_dense()
        if self.mode == "masking" and low is not None:
            sparse = (sparse.double() - low.reshape(sparse.shape).double()).to(sparse.dtype)
        kept = unpack_mask(self.mask, self.matrix_shape[1])
        return PackedLowRankSparse(_copied(self.low_rank), pack_sparse(sparse, kept), self.shape)

    # --- making --------------------------------------------------------------------------------------------

    @property
    def structure(self) -> dict[str, Any]:
        inner = {} if self.low_rank is None else self.low_rank.structure
        return {"low_rank": self.low_rank_name, "mode": self.mode, **inner}

    @classmethod
    def _split(cls, shape: Sequence[int], structure: Mapping[str, Any]) -> LowRankOptions:
        inner = dict(structure)
        _checked_mode(cls.name, inner.pop("mode", "additive"))
        return LowRankOptions(cls.name, shape, inner.pop("low_rank", None), **inner)

    @classmethod
    def factor_shapes(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> tuple[tuple[int, ...], ...]:
        return (*cls._split(shape, structure).factor_shapes(rank), (shape[0], math.prod(shape[1:])))

    @classmethod
    def _of(cls, factors: Sequence[Tensor], shape: Sequence[int], structure: Mapping[str, Any]) -> Self:
        *inner, sparse = factors
        low_rank = cls._split(shape, structure).of(inner)
        return cls(low_rank, sparse, mode=structure.get("mode", "additive"), shape=shape)

    @torch.no_grad()
    def reset_parameters(
        self, variance: float | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        """Random L and S that make W of the given variance with every entry kept, and M so.

        Args:
            variance: of the dense weight's entries; ``2 / fan_in`` when None.

        Raises:
            ValueError: a variance of 0 or below.
        """
        if variance is None:
            variance = 2.0 / math.prod(self.shape[1:])
        if not variance > 0:
            raise ValueError(f"{self.name}: variance must be above 0, got {variance}")
        halved = self.mode == "additive" and self.low_rank is not None
        share = variance / 2 if halved else variance
        if self.low_rank is not None:
            self.low_rank.reset_parameters(share, generator=generator)
        self.sparse.normal_(0.0, math.sqrt(share), generator=generator)
        self.keep(torch.ones(self.shape, dtype=torch.bool, device=self.sparse.device))

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        rank: Rank,
        *,
        init: Literal["residual", "masking"] = "residual",
        outliers: float = 0.1,
        iterations: int = 1500,
        tol: float = 1e-7,
        **options: Any,
    ) -> Self:
        """A weight whose dense form is ``weight`` (to rounding), nothing pruned.

        Args:
            init: "residual": L is fitted to the weight. "masking": to its entries without the share
                ``outliers`` that is largest, which the sparse part can hold. Then ``S = weight - L``, or, in
                mode "masking", where ``weight - L`` would not give the weight back, ``S = weight``.
            outliers: K / 100, in (0, 1), such as the share of S that training will leave.
            iterations, tol: of the fit of "masking".
            options: ``low_rank``, ``mode``, and those of the format of L and of its decomposition.

        Raises:
            ValueError: NaN or Inf in ``weight``, a rank or options that do not fit, a format of L that has no
                fit of observed entries. TypeError: an unknown option.
        """
        weight = weight.detach()
        mode = _checked_mode(cls.name, options.pop("mode", "additive"))
        if init not in ("residual", "masking"):
            raise ValueError(f"{cls.name}: init must be 'residual' or 'masking', got {init!r}")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{cls.name}: weight must be finite, got NaN or Inf")
        split = LowRankOptions(cls.name, weight.shape, options.pop("low_rank", None), **options)
        rank = split.check_rank(cls.name, rank) if split.cls is None else rank
        if split.cls is None:
            return cls(None, weight.clone(), mode=mode)
        matrix = weight.reshape(split.shape)
        if init == "residual":
            low_rank: Format = split.cls.from_dense(matrix, rank, **options)
        else:
            if not 0.0 < outliers < 1.0:
                raise ValueError(f"{cls.name}: outliers must be in (0, 1), got {outliers}")
            count = min(round(outliers * weight.numel()), weight.numel() - 1)
            observed = ~largest(weight, count).reshape(split.shape)
            low_rank = split.cls.from_observed(
                matrix, observed, rank, iterations=iterations, tol=tol, **options
            )
        sparse = weight.clone()
        if mode == "additive":
            low = low_rank.to_dense().detach().reshape(weight.shape)
            sparse = (weight.double() - low.double()).to(weight.dtype)
        return cls(low_rank, sparse.contiguous(), mode=mode)


def _copied(low_rank: Format | None) -> Format | None:
    if low_rank is None:
        return None
    factors = [factor.detach().clone() for factor in low_rank.factors]
    return type(low_rank)._of(factors, low_rank.shape, low_rank.structure)


def _checked_mode(name: str, mode: Any) -> Literal["additive", "masking"]:
    if mode not in MODES:
        raise ValueError(f"{name}: mode must be 'additive' or 'masking', got {mode!r}")
    found: Literal["additive", "masking"] = mode
    return found


def largest(weight: Tensor, count: int) -> Tensor:
    """Bools, True for the ``count`` entries of greatest magnitude; of equal ones the first."""
    flat = weight.detach().abs().flatten()
    order = torch.sort(flat, descending=True, stable=True).indices
    found = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    found[order[:count]] = True
    return found.reshape(weight.shape)
