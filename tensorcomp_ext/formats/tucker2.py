"""Tucker-2: a convolution kernel compressed in its two channel modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..decompose import masked_fit, tucker2
from .base import Format, Rank, as_parameter, check_factor, clip_rank, no_structure, register_format
from .forms import BottleneckConv


@register_format("tucker2")
class Tucker2(Format):
    """``W[t,s,k] = sum_ab factor_out[t,b] core[b,a,k] factor_in[s,a]`` with one to three spatial modes k.

    Ranks are ``(R_out, R_in)``. Stored weights: ``S R_in + R_in R_out prod(k) + R_out T``.

    Args:
        core: ``[R_out, R_in, *kernel]``.
        factor_out: ``[T, R_out]``.
        factor_in: ``[S, R_in]``.

    Raises:
        ValueError, TypeError: factors that do not fit together.

    Source: Tucker 1966; Kim et al. 2016.
    """

    layers: ClassVar[frozenset[str]] = frozenset({"conv"})
    factor_names = ("core", "factor_out", "factor_in")
    core: nn.Parameter
    factor_out: nn.Parameter
    factor_in: nn.Parameter

    def __init__(self, core: Tensor, factor_out: Tensor, factor_in: Tensor) -> None:
        super().__init__()
        dims = core.dim() if isinstance(core, Tensor) else 4
        if dims not in (3, 4, 5):
            raise ValueError(f"tucker2: core must be [R_out, R_in, *kernel], got {list(core.shape)}")
        check_factor("tucker2", core, "core", [None] * dims, "[R_out, R_in, *kernel]")
        rank_out, rank_in = core.shape[:2]
        check_factor(
            "tucker2", factor_out, "factor_out", [None, rank_out], f"[T, R_out] with R_out = {rank_out}"
        )
        check_factor("tucker2", factor_in, "factor_in", [None, rank_in], f"[S, R_in] with R_in = {rank_in}")
        self.core, self.factor_out, self.factor_in = map(as_parameter, (core, factor_out, factor_in))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.factor_out.shape[0], self.factor_in.shape[0], *self.core.shape[2:]))

    @property
    def rank(self) -> tuple[int, int]:
        return self.core.shape[0], self.core.shape[1]

    def bonds(self) -> dict[str, tuple[tuple[str, int], ...]]:
        return {
            "R_out": (("core", 0), ("factor_out", 1)),
            "R_in": (("core", 1), ("factor_in", 1)),
        }

    def to_dense(self) -> Tensor:
        """The kernel ``[T, S, *k]`` in ``K min(S R_out (R_in + T), T R_in (R_out + S))`` MACs."""
        core, factor_out, factor_in = self.core, self.factor_out, self.factor_in
        rank_in = core.shape[1]
        if self._output_first():
            half = (factor_out @ core.flatten(1)).unflatten(1, (rank_in, -1))  # [T, R_in, K]
            dense = factor_in @ half  # [T, S, K]
        else:
            half = factor_in @ core.flatten(2)  # [R_out, S, K]
            dense = (factor_out @ half.flatten(1)).unflatten(1, (factor_in.shape[0], -1))  # [T, S, K]
        return dense.unflatten(2, core.shape[2:])

    def _orders(self) -> tuple[int, int]:
        """Multiply-adds of rebuilding with the output factor first, and with the input factor first."""
        (rank_out, rank_in), (t, s) = self.rank, self.shape[:2]
        taps = math.prod(self.core.shape[2:])
        return taps * t * rank_in * (rank_out + s), taps * s * rank_out * (rank_in + t)

    def _output_first(self) -> bool:
        output_first, input_first = self._orders()
        return output_first < input_first

    def rebuild_macs(self) -> int:
        return min(self._orders())

    def macs(self, in_positions: int, out_positions: int) -> int:
        """``HW S R_in + H'W' (prod(k) R_in R_out + R_out T)``, with HW and H'W' counted over the batch."""
        return in_positions * self.factor_in.numel() + out_positions * (
            self.core.numel() + self.factor_out.numel()
        )

    def lower(self) -> BottleneckConv:
        return BottleneckConv(self.factor_in, self.core, self.factor_out)

    @classmethod
    def check_rank(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> tuple[int, int]:
        no_structure(cls.name, structure)
        ranks = (rank, rank) if isinstance(rank, int) else tuple(rank)
        if len(ranks) != 2:
            raise ValueError(f"tucker2: rank must be an int or (R_out, R_in), got {rank!r}")
        if not 3 <= len(shape) <= 5:
            raise ValueError(f"tucker2: shape must be [T, S, *kernel], got {list(shape)}")
        return (
            clip_rank("tucker2", "R_out", ranks[0], shape[0]),
            clip_rank("tucker2", "R_in", ranks[1], shape[1]),
        )

    @classmethod
    def factor_shapes(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> tuple[tuple[int, ...], ...]:
        rank_out, rank_in = cls.check_rank(shape, rank, **structure)
        return (rank_out, rank_in, *shape[2:]), (shape[0], rank_out), (shape[1], rank_in)

    @classmethod
    def from_dense(
        cls, weight: Tensor, rank: Rank, *, method: Literal["hooi", "hosvd"] = "hooi", **options: Any
    ) -> Self:
        """Decompose a kernel ``[T, S, *k]`` by HOOI (or ``method="hosvd"``) in its two channel modes."""
        no_structure(cls.name, options)
        rank_out, rank_in = cls.check_rank(weight.shape, rank)
        found = tucker2(weight.detach(), rank_out, rank_in, method=method)
        return cls(found.core, found.factor_out, found.factor_in)

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
        found = masked_fit(weight.detach(), observed, "tucker2", ranks, iterations=iterations, tol=tol)
        return cls(*found.factors)
