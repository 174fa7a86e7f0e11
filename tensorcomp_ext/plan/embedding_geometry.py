"""How an embedding reads its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Bound, Geometry


@dataclass(frozen=True)
class EmbeddingGeometry(Geometry):
    """Rows of a table ``[num_embeddings, dim]``, the one of ``padding_idx`` being zero."""

    num_embeddings: int
    padding_idx: int | None = None
    spatial: int = 0

    def apply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None
    ) -> Tensor:
        rows = F.embedding(x, weight)
        if self.padding_idx is None:
            return rows
        # A fill and not a product: what is not finite must not show, nor take part in a gradient.
        return rows.masked_fill((x == self.padding_idx).unsqueeze(-1), 0)

    def pointwise(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        raise TypeError("an embedding has no channels to multiply")

    def prepare(self, weight: Tensor) -> Tensor:
        if self.padding_idx is None:
            return weight
        return weight.index_fill(0, torch.tensor(self.padding_idx, device=weight.device), 0)

    def bind(self, weight: Tensor) -> Bound:
        embedding = torch.embedding
        return lambda x, bias: embedding(weight, x)

    def output_shape(self, shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, ...]:
        return *shape, weight_shape[1]

    def positions(self, shape: Sequence[int]) -> int:
        """Indices; of an output the entries."""
        return math.prod(shape)
