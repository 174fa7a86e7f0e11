"""Embeddings under the plans "dense", "staged" and "fused": what is particular to look-ups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import Support, ttm_embedding
from ..ops._ttm_embedding_autograd import native_ttm_embedding
from ..ops.ttm_embedding import native_support
from ..reference import ttm_embedding as rows_by_slices
from .base import Plan, Stage
from .case import Case
from .embedding_geometry import EmbeddingGeometry
from .geometry import Bound
from .layer import PlannedLayer
from .parts import RECOMPUTED
from .rebuild import rebuild_stage
from .training import TrainingCall

_ORDERING = 16
"""Words moved for each index to bring the indices into the order of their digits."""


def lookup(layer: PlannedLayer) -> EmbeddingGeometry | None:
    """The geometry of an embedding; None for every other layer."""
    geometry = layer.geometry
    return geometry if isinstance(geometry, EmbeddingGeometry) else None


def chain_macs(cores: Sequence[Tensor], indices: int, shared: bool) -> int:
    """Multiply-adds for so many random indices; ``shared``: of each product of leading cores once.

    Of ``n`` random draws out of ``v`` about ``v (1 - (1 - 1/v)^n)`` differ.
    """
    total, rows, ring = 0.0, 1, cores[0].shape[0]
    width = ring * cores[0].shape[2]
    rows *= cores[0].shape[1]
    for k, core in enumerate(cores[1:], 1):
        rank, vocab, dim, after = core.shape
        rows *= vocab
        # The last product is needed for what closes the ring only.
        after = after if k < len(cores) - 1 else 1
        count = -rows * math.expm1(indices * math.log1p(-1 / rows)) if shared and rows > 1 else indices
        total += count * width * rank * dim * after
        width *= dim
    return round(total)


def dense_stages(layer: PlannedLayer, case: Case) -> list[Stage]:
    """The gather, after the rebuild where no table may be kept."""
    rows, dim = layer.weight.shape
    indices = math.prod(case.shape)
    stages = [Stage("linear", 0, dim, indices * (2 * dim + 1))]
    if case.training or case.prefer == "memory":
        rebuilt = rebuild_stage(layer, case)
        stages.append(rebuilt._replace(elements=rebuilt.elements + rows * dim))
    return stages


def dense_support(layer: PlannedLayer, case: Case) -> Support:
    """A table that cannot be kept is worth its rebuild only where most of it is read."""
    rows, indices = layer.weight.shape[0], math.prod(case.shape)
    if (case.training or case.prefer == "memory") and 2 * indices < rows:
        return Support(
            False, f"the table would be rebuilt at every call, for {indices} of its {rows} rows at most"
        )
    return Support(True)


def staged_stages(layer: PlannedLayer, case: Case) -> list[Stage]:
    """Slices gathered for every index, and batched products of them."""
    cores, indices = layer.weight.factors, math.prod(case.shape)
    stages, width = [], cores[0].shape[0]
    for k, core in enumerate(cores):
        rank, _, dim, after = core.shape
        piece = rank * dim * after
        macs = indices * width * piece if k else 0
        moved = indices * (2 * piece + (width * rank if k else 0) + width * dim * after)
        stages.append(Stage("linear", macs, min(rank, dim * after), moved))
        width *= dim
    return stages


def staged_rows(layer: PlannedLayer, x: Tensor) -> Tensor:
    """By the library: slices, one batched product a core."""
    geometry = lookup(layer)
    assert geometry is not None
    if torch.amp.is_autocast_available(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return rows_by_slices(x, layer.weight.factors, geometry.num_embeddings, geometry.padding_idx)
    return rows_by_slices(x, layer.weight.factors, geometry.num_embeddings, geometry.padding_idx)


class StagedEmbedding(Plan):
    """Embeddings by the library: slices of every index, and batched products of them."""

    def serves(self, layer: PlannedLayer) -> bool:
        return lookup(layer) is not None

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        return staged_stages(layer, case)

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        return staged_rows(layer, x)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        return lambda x, bias: staged_rows(layer, x)


class FusedEmbedding(Plan):
    """Embeddings by ``ops.ttm_embedding``: different rows once, leading products shared."""

    def serves(self, layer: PlannedLayer) -> bool:
        return lookup(layer) is not None

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        cores = layer.weight.factors
        return native_support(torch.empty(0, dtype=torch.long, device=cores[0].device), cores)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        cores, indices = layer.weight.factors, math.prod(case.shape)
        rank = max(core.shape[3] for core in cores)
        moved = layer.weight.numel + indices * (layer.weight.shape[1] + _ORDERING)
        return [Stage("fused", chain_macs(cores, indices, shared=True), rank, moved)]

    def backward_factor(self, layer: PlannedLayer) -> float:
        return RECOMPUTED

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        geometry = lookup(layer)
        assert geometry is not None
        return ttm_embedding(
            x, layer.weight.factors, num_embeddings=geometry.num_embeddings, padding_idx=geometry.padding_idx
        )

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        call, cores = self._call(layer), [core.detach() for core in layer.weight.factors]
        return lambda x, bias: call(x, cores)

    def bind_training(self, layer: PlannedLayer, case: Case) -> TrainingCall:
        call = self._call(layer)
        return lambda layer, x: call(x, layer.weight.factors)

    @staticmethod
    def _call(layer: PlannedLayer) -> Any:
        """The op for checked arguments that no transform sees."""
        geometry = lookup(layer)
        assert geometry is not None
        rows = geometry.num_embeddings
        padding = -1 if geometry.padding_idx is None else geometry.padding_idx
        return lambda x, cores: native_ttm_embedding(x, cores, rows, padding)
