"""The computational forms to which every format lowers; kernels and plans know these and no format."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops import PackedSparse


@dataclass(frozen=True)
class BottleneckConv:
    """Pointwise S -> A, spatial core A -> B, pointwise B -> T; as ``ops.bottleneck_conv2d`` takes it.

    ``W[t,s,k] = sum_qab point_out[t, q B + b] core[b,a,k] point_in[s, q A + a]`` with ``q < ring``, the core
    being shared by all ring indices; depthwise
    ``W[t,s,k] = sum_r point_out[t,r] core[r,0,k] point_in[s,r]``.
    """

    point_in: Tensor
    """``[S, ring A]``"""
    core: Tensor
    """``[B, A, *kernel]``; depthwise ``[R, 1, *kernel]``"""
    point_out: Tensor
    """``[T, ring B]``"""
    ring: int = 1
    depthwise: bool = False


@dataclass(frozen=True)
class TwoFactor:
    """A weight matrix as the product of two: ``W[o,i] = sum_r a[o,r] b[r,i]``."""

    a: Tensor
    """``[M, R]``"""
    b: Tensor
    """``[R, N]``"""


@dataclass(frozen=True)
class Network:
    """A weight matrix as a network of cores.

    Every mode of every core carries a label. The matrix is the product of all cores, summed over every label
    that is neither an output nor an input, wherever it occurs: the rank of CP ties all factors together.
    """

    cores: tuple[Tensor, ...]
    labels: tuple[tuple[int, ...], ...]
    """One label for each mode of each core."""
    outputs: tuple[int, ...]
    """Labels of the output modes; row-major they index the rows of the matrix."""
    inputs: tuple[int, ...]
    """Labels of the input modes; row-major they index its columns."""

    @property
    def sizes(self) -> dict[int, int]:
        """Size of every label."""
        return {
            label: size
            for core, labels in zip(self.cores, self.labels, strict=True)
            for label, size in zip(labels, core.shape, strict=True)
        }


@dataclass(frozen=True)
class TapNetwork:
    """A kernel as taps shared by all channels, and a network at every pixel.

    ``W[t,s,k] = sum_r taps[r,k] N[t, (r, s)]``: every input channel is convolved alone with the taps, then
    the network maps ``(r, s)`` to t.
    """

    taps: Tensor
    """``[R, *kernel]``"""
    network: Network
    """From ``(R, *input modes)`` to the output modes."""


@dataclass(frozen=True)
class SparseSum:
    """A low-rank weight and entries of a dense matrix: ``W = L + M * S``, or ``W = (1 - M) * L + M * S``.

    Matrices of a kernel are ``[T, S K]``. For training: plans rebuild W, or multiply both parts apart.
    """

    low_rank: Form | None
    values: Tensor
    """S, ``[M, N]``"""
    mask: Tensor
    """M, one bit an entry, as ``ops.pack_mask`` makes it"""
    masking: bool
    """Whether S takes the place of L."""


@dataclass(frozen=True)
class PackedSum:
    """``W = a b + S`` with S packed, of a kernel as the matrix ``[T, S K]``."""

    pair: TwoFactor | None
    """The low-rank part as two matrices; None where it is none, or no such product."""
    sparse: PackedSparse
    low_rank: bool
    """Whether there is a low-rank part."""


Form = BottleneckConv | TwoFactor | Network | TapNetwork | SparseSum | PackedSum
