"""The rows of the embedding suite: lookups in a table that is stored as a chain of cores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from .cases import check_keys
from .chain_cases import LAYOUT, read_dtype, read_modes
from .cores import CORES, PAIRED, Cores

_KEYS = ("format", "vocab", "dim", "vocab_modes", "dim_modes", "rank", "rows", "dtype")


@dataclass(frozen=True)
class EmbeddingCase:
    """``rows`` lookups in a table ``[vocab, dim]``; ``prod(vocab_modes)`` may be more than ``vocab``.

    ``dtype`` None stands for each one the run asks for.
    """

    format: str
    vocab: int
    dim: int
    vocab_modes: tuple[int, ...]
    dim_modes: tuple[int, ...]
    rank: int
    rows: int
    dtype: str | None = None
    layout: str = LAYOUT

    @cached_property
    def cores(self) -> Cores:
        """Cores ``[r, vocab_k, dim_k, r']``; outputs are the modes of the vocabulary, inputs those of dim."""
        return CORES[self.format](self.vocab_modes, self.dim_modes, self.rank)

    def label(self) -> str:
        """Such as ``ttm 4096 of 1000000x64 r16``."""
        return f"{self.format} {self.rows} of {self.vocab}x{self.dim} r{self.rank}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def embedding_from_dict(row: Mapping[str, Any], where: str = "case") -> EmbeddingCase:
    """Build a case from the JSON keys format, vocab, dim, vocab_modes, dim_modes, rank, rows, dtype.

    ``vocab`` and ``dim`` may be left out, being the products of the modes; so may dtype.

    Raises:
        ValueError: unknown or missing keys, values out of range; the text names the case and the key.
    """
    check_keys(row, _KEYS, where)
    if row.get("format") not in PAIRED:
        raise ValueError(f"{where}: format must be one of {', '.join(PAIRED)}, got {row.get('format')!r}")
    vocab_modes, dim_modes = (read_modes(row, key, where) for key in ("vocab_modes", "dim_modes"))
    if len(vocab_modes) != len(dim_modes):
        raise ValueError(
            f"{where}: there must be as many vocab_modes as dim_modes, got {list(vocab_modes)} and "
            f"{list(dim_modes)}"
        )
    sizes = {"vocab": math.prod(vocab_modes), "dim": math.prod(dim_modes)}
    values: dict[str, Any] = (
        sizes | {k: row.get(k) for k in ("rank", "rows")} | {k: row[k] for k in sizes if k in row}
    )
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {key} must be an int >= 1, got {value!r}")
    if values["vocab"] > sizes["vocab"] or values["dim"] != sizes["dim"]:
        key = "vocab" if values["vocab"] > sizes["vocab"] else "dim"
        word = "at most " if key == "vocab" else ""
        raise ValueError(f"{where}: {key} must be {word}{sizes[key]}, as its modes make, got {values[key]}")
    return EmbeddingCase(
        row["format"],
        values["vocab"],
        values["dim"],
        vocab_modes,
        dim_modes,
        row["rank"],
        row["rows"],
        read_dtype(row, where),
    )


_TABLES: tuple[tuple[str, int, int, tuple[int, ...], tuple[int, ...], int], ...] = (
    # format, vocab, dim, vocab_modes, dim_modes, rank: a large table, SST-5, IWSLT'14
    ("ttm", 1_000_000, 64, (100, 100, 100), (4, 4, 4), 16),
    ("ttm", 18_000, 256, (10, 10, 12, 15), (4, 4, 4, 4), 16),
    ("tr_matrix", 32_768, 512, (32, 32, 32), (8, 8, 8), 32),
)
_COUNTS = (4096, 1, 128, 65536)


def embedding_cases(device: str) -> list[EmbeddingCase]:
    """Each table at batches of 1 to 65,536 random lookups."""
    return [EmbeddingCase(*table, rows) for table in _TABLES for rows in _COUNTS]


def quick_embeddings() -> list[EmbeddingCase]:
    return [
        EmbeddingCase("ttm", 110, 12, (4, 5, 6), (2, 3, 2), 4, 9),
        EmbeddingCase("tr_matrix", 63, 8, (9, 7), (2, 4), 3, 200),
    ]
