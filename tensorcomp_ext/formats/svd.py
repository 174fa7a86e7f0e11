"""SVD: a weight matrix as a product of two thin ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..decompose import masked_fit, svd_factors
from .base import Format, Rank, as_parameter, check_factor, clip_rank, no_structure, register_format
from .forms import TwoFactor


@register_format("svd")
class SVD(Format):
    """``W[o,i] = sum_r a[o,r] b[r,i]``, from the decomposition ``a = U S``, ``b = V^T``.

    Stored weights: ``R (M + N)``, fewer than the dense ``M N`` only for ``R < M N / (M + N)``.

    Args:
        a: ``[M, R]``.
        b: ``[R, N]``.

    Raises:
        ValueError, TypeError: factors that do not fit together.

    Source: Eckart and Young 1936; Denil et al. 2013.
    """

    layers: ClassVar[frozenset[str]] = frozenset({"linear"})
    factor_names = ("a", "b")
    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        check_factor("svd", a, "a", [None, None], "[M, R]")
        check_factor("svd", b, "b", [a.shape[1], None], f"[R, N] with R = {a.shape[1]}")
        self.a, self.b = as_parameter(a), as_parameter(b)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.a.shape[0], self.b.shape[1]))

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def bonds(self) -> dict[str, tuple[tuple[str, int], ...]]:
        return {"R": (("a", 1), ("b", 0))}

    def to_dense(self) -> Tensor:
        """The matrix ``[M, N]``; cost ``M N R`` MACs."""
        return self.a @ self.b

    def rebuild_macs(self) -> int:
        return self.a.numel() * self.b.shape[1]

    def macs(self, in_positions: int, out_positions: int) -> int:
        """``rows R (M + N)``."""
        return in_positions * self.b.numel() + out_positions * self.a.numel()

    def lower(self) -> TwoFactor:
        return TwoFactor(self.a, self.b)

    @classmethod
    def check_rank(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> int:
        no_structure(cls.name, structure)
        if len(shape) != 2:
            raise ValueError(f"svd: shape must be [M, N], got {list(shape)}")
        if not isinstance(rank, int):
            if len(rank) != 1:
                raise ValueError(f"svd: rank must be one int, got {rank!r}")
            rank = rank[0]
        return clip_rank("svd", "R", rank, min(shape))

    @classmethod
    def factor_shapes(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> tuple[tuple[int, ...], ...]:
        kept = cls.check_rank(shape, rank, **structure)
        return (shape[0], kept), (kept, shape[1])

    @classmethod
    def from_dense(cls, weight: Tensor, rank: Rank, **options: Any) -> Self:
        """Truncated SVD of a matrix ``[M, N]``, the best approximation of that rank."""
        no_structure(cls.name, options)
        found = svd_factors(weight.detach(), cls.check_rank(weight.shape, rank))
        return cls(found.a, found.b)

    @classmethod
    def from_observed(
        cls,
        weight: Tensor,
        observed: Tensor,
        rank: Rank,
        *,
        iterations: int = 1500,
        tol: float = 1e-7,
        **options: Any,
    ) -> Self:
        no_structure(cls.name, options)
        ranks = cls.check_rank(weight.shape, rank)
        found = masked_fit(weight.detach(), observed, "svd", ranks, iterations=iterations, tol=tol)
        return cls(*found.factors)
