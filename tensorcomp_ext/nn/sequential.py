"""Factorized weights as standard torch.nn layers, for exporters that know no others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..formats import CP, BottleneckConv, Network, PackedSum, SparseSum, TapNetwork, TwoFactor, two_factor
from ..ops._contraction_products import contraction

if TYPE_CHECKING:
    from .conv import _FactorizedConv
    from .linear import FactorizedLinear


class Convolution(NamedTuple):
    """One convolution: its weight, the spatial dims along which it has the layer's geometry, its groups."""

    weight: Tensor
    along: tuple[int, ...] = ()
    groups: int = 1


def convolutions(layer: _FactorizedConv) -> list[Convolution]:
    """The convolutions that together are the layer, the bias belonging to the last.

    Bottleneck: pointwise, core, pointwise. CP: pointwise, one depthwise convolution for every dim, pointwise.
    Tensor ring: pointwise, the core as a grouped convolution that repeats it for every ring index, pointwise.
    TTM: depthwise with the taps of every channel, pointwise. One dense convolution where that is less work,
    and of weights with a sparse part.
    """
    form, spatial = layer.weight.lower(), layer.spatial
    every = tuple(range(spatial))
    if isinstance(form, (SparseSum, PackedSum)):
        return [Convolution(layer.weight.to_dense(), every, layer.groups)]
    if isinstance(form, TapNetwork):
        found = _tap_convolutions(form, every)
    else:
        assert isinstance(form, BottleneckConv)
        found = [
            Convolution(_pointwise(form.point_in.t(), spatial)),
            *_cores(layer, form, every),
            Convolution(_pointwise(form.point_out, spatial)),
        ]
    dense = math.prod(layer.weight.shape)
    if isinstance(form, TapNetwork) and sum(part.weight.numel() for part in found) >= dense:
        return [Convolution(layer.weight.to_dense(), every)]
    return found


def _pointwise(matrix: Tensor, spatial: int) -> Tensor:
    return matrix.reshape(*matrix.shape, *(1,) * spatial)


def _cores(layer: _FactorizedConv, form: BottleneckConv, every: tuple[int, ...]) -> list[Convolution]:
    if not form.depthwise:
        weight = torch.cat([form.core] * form.ring)  # [ring B, A, *kernel]
        return [Convolution(weight, every, form.ring)]
    rank = form.core.shape[0]
    if not isinstance(layer.weight, CP):
        return [Convolution(form.core, every, rank)]
    found = []
    for dim, factor in enumerate(layer.weight.tap_factors):  # [k, R]
        sizes = [1] * len(every)
        sizes[dim] = factor.shape[0]
        found.append(Convolution(factor.t().reshape(rank, 1, *sizes), (dim,), rank))
    return found


def _tap_convolutions(form: TapNetwork, every: tuple[int, ...]) -> list[Convolution]:
    taps, network = form.taps, form.network
    rank = taps.shape[0]
    matrix = _matrix(network)  # [T, (R, S)]
    channels = matrix.shape[1] // rank
    depthwise = torch.cat([taps.unsqueeze(1)] * channels)  # [(S, R), 1, *kernel]
    mixing = matrix.unflatten(1, (rank, channels)).transpose(1, 2).flatten(1)  # [T, (S, R)]
    return [Convolution(depthwise, every, channels), Convolution(_pointwise(mixing, len(every)))]


def _matrix(network: Network) -> Tensor:
    whole = contraction(network.labels, network.sizes, network.outputs + network.inputs)
    rows = math.prod(network.sizes[label] for label in network.outputs)
    return whole(network.cores, (rows, -1))


def matrices(layer: FactorizedLinear) -> Sequence[Tensor]:
    """The matrices that applied in this order are the layer: two, or the dense one where that is less work.

    A network is merged where output and input modes part; TTM and TR-matrix have both in every core. A weight
    with a sparse part is dense.
    """
    form = layer.weight.lower()
    if isinstance(form, (SparseSum, PackedSum)):
        return [layer.weight.to_dense()]
    pair = two_factor(form) if isinstance(form, Network) else form
    if pair is None:
        return [layer.weight.to_dense()]
    assert isinstance(pair, TwoFactor)
    whole = math.prod(layer.weight.shape)
    if isinstance(form, Network) and pair.a.numel() + pair.b.numel() >= whole:
        return [layer.weight.to_dense()]
    return [pair.b, pair.a]
