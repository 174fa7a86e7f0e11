"""Packed low-rank + sparse weights by ``ops.lowrank_sparse_linear``, for the plan ``fused``."""

from __future__ import annotations

import math

from torch import Tensor

from ..formats import PackedSum
from ..ops import Support, lowrank_sparse_linear
from ..ops.lowrank_sparse_linear import (
    bind_lowrank_sparse,
    bind_packed_lowrank_sparse,
    lowrank_sparse_sizes,
    native_support,
    pack_lowrank_sparse,
)
from .base import Plan, Stage
from .case import Case
from .geometry import Bound, ConvGeometry, LinearGeometry
from .layer import PlannedLayer
from .parts import in_autocast_dtype


class FusedSparse(Plan):
    """Both factors and the sparse rows in one pass over the output; neither matrix is made dense.

    Linear layers, and two-dimensional convolutions that are one matrix at every pixel, of channels-last
    images.
    """

    def serves(self, layer: PlannedLayer) -> bool:
        form = layer.weight.lower()
        if not isinstance(form, PackedSum) or (form.low_rank and form.pair is None):
            return False
        return isinstance(layer.geometry, LinearGeometry) or is_pointwise(layer)

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        if layer.geometry.spatial and case.layout != "channels_last":
            return Support(
                False, f"the pixels' channels must lie together, as channels-last, not {case.layout}"
            )
        a, b = _pair(layer)
        # An empty batch carries device, dtype and sizes without memory.
        probe = b.new_empty((0, b.shape[1]), dtype=case.torch_dtype)
        rows = layer.geometry.positions(layer.geometry.output_shape(case.shape, layer.weight.shape))
        return native_support(probe, a, b, rows)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        form, geometry = _form(layer), layer.geometry
        output = geometry.output_shape(case.shape, layer.weight.shape)
        rows, nnz = geometry.positions(output), form.sparse.values.shape[0]
        moved = math.prod(case.shape) + math.prod(output)
        # The rate was measured on matrices of eight times the width.
        width = max(1, min(form.sparse.shape) // 8)
        sparse = Stage("sparse", rows * nnz, width, moved + nnz + nnz // 2)
        if form.pair is None:
            return [sparse]
        weights, rank = form.pair.a.numel() + form.pair.b.numel(), form.pair.a.shape[1]
        return [sparse, Stage("pair", rows * weights, rank, weights, calls=0, inner=2 * rows * rank)]

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        sparse = _form(layer).sparse
        x, a, b, values, bias = in_autocast_dtype(x, *_pair(layer), sparse.values, layer.bias)
        sparse = sparse._replace(values=values)
        if not layer.geometry.spatial:
            return lowrank_sparse_linear(x, a, b, sparse, bias)
        return lowrank_sparse_linear(x.movedim(1, -1), a, b, sparse, bias).movedim(-1, 1)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        call = self._bound(layer, case)
        if not layer.geometry.spatial:
            return call
        return lambda x, bias: call(x.movedim(1, -1), bias).movedim(-1, 1)

    def _bound(self, layer: PlannedLayer, case: Case) -> Bound:
        dtype, sparse = case.torch_dtype, _form(layer).sparse
        a, b = _pair(layer)

        def parts() -> tuple[Tensor, ...]:
            return a.detach().to(dtype), b.detach().to(dtype), sparse.values.detach().to(dtype), *sparse[1:3]

        def packed() -> tuple[Tensor, ...]:
            low, high, values, *_ = parts()
            return (pack_lowrank_sparse(low, high, sparse._replace(values=values)),)

        rows = layer.geometry.positions(layer.geometry.output_shape(case.shape, layer.weight.shape))
        # The CUDA kernels read the parts as they are.
        if b.is_cuda or rows >= _unpacked_rows(sparse.values.numel() / max(1, math.prod(sparse.shape))):
            return bind_lowrank_sparse(*layer.prepared("fused as it is", dtype, parts))
        (panels,) = layer.prepared("fused", dtype, packed)
        return bind_packed_lowrank_sparse(panels, lowrank_sparse_sizes(a, b))


def _unpacked_rows(density: float) -> int:
    """Rows from which on the kernel for packed entries as they are stored is the faster one on the CPU.

    It brings 16 rows of the input side by side, so that an entry takes one instruction for all of them, which
    pays once that has been done for many; the panels pay from the first row on. Measured on AVX-512, one
    thread: 256 x 256 to 3072 x 768, 5 to 50 % of the entries kept.
    """
    return 64 if density <= 0.2 else 128


def is_pointwise(layer: PlannedLayer) -> bool:
    """Whether this is a two-dimensional convolution that multiplies each pixel's channels by one matrix."""
    geometry, shape = layer.geometry, layer.weight.shape
    if not isinstance(geometry, ConvGeometry) or geometry.spatial != 2 or math.prod(shape[2:]) != 1:
        return False
    return geometry.groups == 1 and set(geometry.stride) == {1} and not any(geometry.symmetric_padding(shape))


def _form(layer: PlannedLayer) -> PackedSum:
    form = layer.weight.lower()
    assert isinstance(form, PackedSum)
    return form


def _pair(layer: PlannedLayer) -> tuple[Tensor, Tensor]:
    """Both factors; of rank one and zero where there is no low-rank part."""
    form = _form(layer)
    if form.pair is not None:
        return form.pair.a, form.pair.b
    rows, columns = form.sparse.shape
    values = form.sparse.values
    return values.new_zeros(rows, 1), values.new_zeros(1, columns)
