"""The computational forms to which every format lowers; kernels and plans know these and no format."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BottleneckConv:
    """Pointwise S -> A, spatial core A -> B, pointwise B -> T.

    ``W[t,s,k] = sum_ab point_out[t,b] core[b,a,k] point_in[s,a]``
    """

    point_in: Tensor
    """``[S, A]``"""
    core: Tensor
    """``[B, A, *kernel]``"""
    point_out: Tensor
    """``[T, B]``"""


@dataclass(frozen=True)
class TwoFactor:
    """A weight matrix as the product of two: ``W[o,i] = sum_r a[o,r] b[r,i]``."""

    a: Tensor
    """``[M, R]``"""
    b: Tensor
    """``[R, N]``"""
