"""Batch normalization in evaluation mode as a factor and an addend for each output; formats that take it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tensorcomp_ext.formats import (
    CP,
    SVD,
    TR,
    BottleneckConv,
    Format,
    Network,
    PackedLowRankSparse,
    Tucker2,
    TwoFactor,
)
from tensorcomp_ext.formats._sparse import SparseFormat
from tensorcomp_ext.formats.merge import two_factor

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def tolerance(dtype: torch.dtype) -> float:
    """Relative L2 difference that another order of roundings explains."""
    return _TOLERANCES.get(dtype, 1e-4)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative L2 difference, infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.detach().double()
    return float((found.detach().double() - wide).norm() / wide.norm().clamp_min(1e-30))


def affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64, of a batch normalization with running statistics: ``y = scale x + shift``."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def folded_bias(bias: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """The bias of a layer that a batch normalization followed."""
    total = shift if bias is None else bias.detach().double() * scale + shift
    return nn.Parameter(total.to(dtype), requires_grad=False)


class CannotScale(Exception):
    """A format has no core to multiply its outputs in."""


def scaled(weight: Format, scale: Tensor) -> Format:
    """A format whose dense weight is that of ``weight`` with output t multiplied by ``scale[t]``.

    Modes of the channels are merged where several cores share them, so that one holds every output by itself.

    Raises:
        CannotScale: no core can, as in TTM, whose cores hold modes of outputs and inputs alike; or, merged,
            a matrix would take more than its cores, or a kernel more than dense.
    """
    made = _merged_and_scaled(weight, scale)
    if made is None:
        raise CannotScale(f"no core of format {weight.name!r} holds every output by itself, to be scaled")
    most = weight.numel if len(weight.shape) == 2 else max(weight.numel, math.prod(weight.shape))
    if made.numel > most:
        raise CannotScale(
            f"with its modes merged, so that every output can be scaled, {weight.name!r} would store "
            f"{made.numel:,} weights, not {weight.numel:,}"
        )
    return made


def _merged_and_scaled(weight: Format, scale: Tensor) -> Format | None:
    if isinstance(weight, SparseFormat):
        return _scaled_sum(weight, scale)
    form: Any = weight.lower()
    if isinstance(form, Network):
        form = two_factor(form)
    if isinstance(form, TwoFactor):
        return SVD(_times(form.a, scale), form.b.detach().clone())
    if not isinstance(form, BottleneckConv):
        return None
    point_in, core = form.point_in.detach().clone(), form.core.detach().clone()
    point_out = _times(form.point_out, scale)
    if isinstance(weight, CP):
        taps = [factor.detach().clone() for factor in weight.tap_factors]
        return CP([point_out, point_in, *taps], weight.shape)
    if form.ring == 1:
        return Tucker2(core, point_out, point_in)
    # Column q A + a of point_in and column q B + b of point_out belong to ring index q.
    rank_out, rank_in = core.shape[:2]
    cores = [
        point_in.unflatten(1, (form.ring, rank_in)).permute(1, 0, 2),  # [R_0, S, A]
        core.flatten(2).permute(1, 2, 0),  # [A, taps, B]
        point_out.unflatten(1, (form.ring, rank_out)).permute(2, 0, 1),  # [B, T, R_0]
    ]
    return TR([c.contiguous() for c in cores], weight.shape)


def _scaled_sum(weight: SparseFormat, scale: Tensor) -> Format | None:
    """A low-rank and a sparse part, both scaled; packed, as what is folded is for inference."""
    packed = weight.finalized()
    assert isinstance(packed, PackedLowRankSparse)
    low, pair = packed.low_rank, packed.factor_pair()
    if pair is not None:
        low = SVD(_times(pair.a, scale), pair.b.detach().clone())
    elif low is not None and (low := _merged_and_scaled(low, scale)) is None:
        return None
    sparse = packed.packed
    segments = (sparse.offsets.shape[0] - 1) // max(1, sparse.shape[0])
    counts = (sparse.offsets[1:] - sparse.offsets[:-1]).long()
    rows = torch.repeat_interleave(scale.repeat_interleave(segments), counts)
    values = (sparse.values.detach().double() * rows).to(sparse.values.dtype)
    return PackedLowRankSparse(low, sparse._replace(values=values), packed.shape)


def _times(matrix: Tensor, scale: Tensor) -> Tensor:
    """Every row of ``matrix`` times its factor, rounded once."""
    return (matrix.detach().double() * scale[:, None]).to(matrix.dtype)
