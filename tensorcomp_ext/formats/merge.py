"""A weight cut in two: the cores with output modes against those with input modes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ops._contraction_products import Contraction, contraction
from .forms import BottleneckConv, Form, Network, TwoFactor

Labels = Sequence[Sequence[int]]


@dataclass(frozen=True)
class TwoFactorPlan:
    """Which cores of a network go into which of two matrices, and how they are contracted there."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    make_left: Contraction
    make_right: Contraction
    rank: int

    def __call__(self, cores: Sequence[Tensor]) -> TwoFactor:
        a = self.make_left([cores[place] for place in self.left], (-1, self.rank))
        b = self.make_right([cores[place] for place in self.right], (self.rank, -1))
        return TwoFactor(a, b)

    @property
    def macs(self) -> int:
        """Multiply-adds of making both matrices."""
        return self.make_left.macs + self.make_right.macs


def two_factor_plan(
    labels: Labels, sizes: Mapping[int, int], outputs: Sequence[int], inputs: Sequence[int]
) -> TwoFactorPlan | None:
    """How a network of these labels is cut between its output and its input modes.

    None where a core has modes of both. Cores with modes of neither, as Tucker's, go to the side that leaves
    the smaller rank.
    """
    out_set, in_set = set(outputs), set(inputs)
    left: list[int] = []
    right: list[int] = []
    neutral: list[int] = []
    for place, group in enumerate(labels):
        if out_set & set(group) and in_set & set(group):
            return None
        side = left if out_set & set(group) else right if in_set & set(group) else neutral
        side.append(place)
    splits = [(left + neutral, right), (left, right + neutral)] if neutral else [(left, right)]

    def bond(split: tuple[list[int], list[int]]) -> list[int]:
        a, b = ({label for place in side for label in labels[place]} for side in split)
        return sorted(a & b)

    first, second = min(splits, key=lambda split: math.prod(sizes[label] for label in bond(split)))
    shared = tuple(bond((first, second)))
    return TwoFactorPlan(
        tuple(first),
        tuple(second),
        contraction([labels[place] for place in first], sizes, (*outputs, *shared)),
        contraction([labels[place] for place in second], sizes, (*shared, *inputs)),
        math.prod(sizes[label] for label in shared),
    )


def two_factor(network: Network) -> TwoFactor | None:
    """``W = a b`` with all output modes in a and all input modes in b; None where a core has modes of both.

    Cores with modes of neither, as Tucker's, go to the side that leaves the smaller rank. Differentiable.
    """
    plan = two_factor_plan(network.labels, network.sizes, network.outputs, network.inputs)
    return None if plan is None else plan(network.cores)


@dataclass(frozen=True)
class MatrixCut:
    """How the weight of a format is a product ``a b``, a kernel ``[T, S, *k]`` as the matrix ``[T, S K]``."""

    rank: int
    macs: int
    """Multiply-adds of making a and b and of their product."""
    network: TwoFactorPlan | None = None

    def __call__(self, form: Form) -> TwoFactor:
        """The two matrices of a weight that lowers to ``form``; differentiable."""
        if isinstance(form, TwoFactor):
            return form
        if isinstance(form, Network):
            assert self.network is not None
            return self.network(form.cores)
        assert isinstance(form, BottleneckConv)
        return _bottleneck(form)


def matrix_cut(form: Form) -> MatrixCut | None:
    """The cut of a weight that lowers to ``form``; None where there is none, as for TTM."""
    if isinstance(form, TwoFactor):
        rank = form.a.shape[1]
        return MatrixCut(rank, form.a.numel() * form.b.shape[1])
    if isinstance(form, Network):
        sizes = form.sizes
        plan = two_factor_plan(form.labels, sizes, form.outputs, form.inputs)
        if plan is None:
            return None
        whole = math.prod(sizes[label] for label in form.outputs + form.inputs)
        return MatrixCut(plan.rank, plan.macs + plan.rank * whole, plan)
    if isinstance(form, BottleneckConv):
        (inputs, _), rank = form.point_in.shape, form.point_out.shape[1]
        columns = inputs * math.prod(form.core.shape[2:])  # S K
        inner = form.core.shape[1]  # of a depthwise core 1
        return MatrixCut(rank, columns * rank * (inner + form.point_out.shape[0]))
    return None


def _bottleneck(form: BottleneckConv) -> TwoFactor:
    """``a = point_out``, ``b[(q B + b), (s, k)] = sum_a core[b,a,k] point_in[s, q A + a]``."""
    rank = form.point_out.shape[1]
    if form.depthwise:
        b = form.point_in.t().unsqueeze(2) * form.core.flatten(1).unsqueeze(1)  # [R, S, K]
        return TwoFactor(form.point_out, b.reshape(rank, -1))
    core = form.core.flatten(2)  # [B, A, K]
    # [S, ring, A] against [B, A, K]: one product a ring index, and the input channels before the taps.
    ins = form.point_in.unflatten(1, (form.ring, core.shape[1])).permute(1, 0, 2)  # [ring, S, A]
    b = ins.unsqueeze(1) @ core.unsqueeze(0)  # [ring, B, S, K]
    return TwoFactor(form.point_out, b.reshape(rank, -1))
