"""TTM and TR-matrix embeddings for the tests: cores, indices and the dense table they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CORE_LAYOUTS = ("contiguous", "turned", "sliced")


@dataclass(frozen=True)
class EmbeddingCase:
    """Modes, ranks (the first is the ring) and what is looked up."""

    vocab: tuple[int, ...] = (3, 5, 4)
    dims: tuple[int, ...] = (2, 3, 4)
    ranks: tuple[int, ...] = (1, 4, 5)
    missing: int = 3
    """Rows that the modes have beyond the vocabulary."""
    shape: tuple[int, ...] = (7, 3)
    padding: int = -1
    layout: str = "contiguous"
    integers: torch.dtype = torch.int64

    @property
    def rows(self) -> int:
        return math.prod(self.vocab) - self.missing

    @property
    def dim(self) -> int:
        return math.prod(self.dims)

    def but(self, **changes: Any) -> EmbeddingCase:
        return replace(self, **changes)

    def cores(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
        after = (*self.ranks[1:], self.ranks[0])
        shapes = list(zip(self.ranks, self.vocab, self.dims, after, strict=True))
        return [_laid_out(s, self.layout, dtype).to(device) for s in shapes]

    def indices(self, device: str = "cpu") -> Tensor:
        """Random ones, with repetitions, and the first, last and padding row where there is room."""
        found = torch.randint(0, self.rows, self.shape, dtype=self.integers)
        special = [0, self.rows - 1, max(self.padding, 0), self.rows - 1]
        for place, index in zip(range(found.numel()), special, strict=False):
            found.view(-1)[-1 - place] = index
        return found.to(device)

    def table(self, cores: list[Tensor]) -> Tensor:
        """The dense table, entry by entry of the definition: every digit's slices multiplied in turn."""
        rows = []
        for index in range(self.rows):
            product: Tensor | None = None
            rest = index
            for vocab, core in zip(self.vocab[::-1], cores[::-1], strict=True):
                rest, digit = divmod(rest, vocab)
                piece = core[:, digit]  # [r, dim_k, r']
                product = piece if product is None else torch.tensordot(piece, product, 1).flatten(1, 2)
            assert product is not None
            row = sum(product[a, :, a] for a in range(product.shape[0]))
            rows.append(torch.zeros_like(row) if index == self.padding else row)  # type: ignore[arg-type]
        return torch.stack(rows)


def _laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """Entries that keep products of a few cores near one, in a memory order of the name."""
    scale = shape[0] ** -0.5
    if layout == "turned":
        return (torch.randn(shape[::-1]) * scale).to(dtype).permute(3, 2, 1, 0)
    if layout == "sliced":
        wide = tuple(2 * s + 1 for s in shape)
        return (torch.randn(wide) * scale).to(dtype)[tuple(slice(1, None, 2) for _ in shape)]
    return (torch.randn(shape) * scale).to(dtype)


EMBEDDING_CASES = [
    EmbeddingCase(),
    EmbeddingCase(shape=(), missing=0),
    EmbeddingCase(shape=(0, 4)),
    EmbeddingCase(shape=(2, 3, 5), padding=6),
    EmbeddingCase(shape=(40,), integers=torch.int32, padding=0),
    EmbeddingCase((7,), (5,), (1,), 2, (9,)),
    EmbeddingCase((6, 5), (3, 4), (1, 3), 1, (50,)),
    EmbeddingCase((1, 9), (1, 7), (1, 1), 0, (11,)),
    EmbeddingCase((5, 4), (2, 3), (3, 4), 2, (33,), padding=3),
    EmbeddingCase((4, 3, 5), (3, 2, 5), (2, 3, 17), 4, (64,), padding=55),
    EmbeddingCase((4, 7, 3), (4, 4, 4), (1, 16, 16), 2, (129,)),
    EmbeddingCase((2, 3, 2, 4), (2, 1, 3, 2), (1, 2, 6, 3), 5, (31,)),
    EmbeddingCase((3, 2, 2, 3), (2, 2, 3, 1), (2, 2, 3, 4), 1, (100,), padding=7),
    EmbeddingCase((3, 4, 2), (8, 8, 8), (4, 19, 32), 0, (21,)),
]
