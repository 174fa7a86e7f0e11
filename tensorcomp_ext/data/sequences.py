"""Token sequences of different lengths, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch


@dataclass(frozen=True)
class Sequences:
    """Sequences of token numbers, one behind another in memory.

    Attributes:
        tokens: int64 [total].
        offsets: int64 [N + 1]: sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.

    Raises ValueError where these do not fit together.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("offsets", self.offsets)):
            if value.dtype != torch.int64 or value.dim() != 1:
                raise ValueError(
                    f"Sequences: {name} must be int64 of one dimension, got {value.dtype} {list(value.shape)}"
                )
        if (
            not len(self.offsets)
            or int(self.offsets[0]) != 0
            or int(self.offsets[-1]) != len(self.tokens)
            or bool((self.lengths < 0).any())
        ):
            raise ValueError(
                f"Sequences: offsets must rise from 0 to the number of tokens, {len(self.tokens)}, "
                f"got {self.offsets.tolist()[:8]}"
            )

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Sequences:
        """From lists of numbers."""
        kept = list(rows)
        lengths = torch.tensor([0, *(len(row) for row in kept)])
        return cls(torch.tensor(list(chain.from_iterable(kept)), dtype=torch.int64), lengths.cumsum(0))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [N]."""
        return self.offsets.diff()

    def select(self, indices: torch.Tensor) -> Sequences:
        """The sequences of those numbers, in that order."""
        rows, lengths = self.padded(indices)
        kept = torch.arange(rows.shape[1]) < lengths[:, None]
        return Sequences(rows[kept], torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))

    def padded(self, indices: torch.Tensor, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences by number as the rows of a rectangle, and their lengths.

        Arguments:
            indices: int64 [B].
            pad: what stands behind the shorter ones.

        Returns int64 [B, longest of them] and int64 [B].
        """
        starts, lengths = self.offsets[:-1][indices], self.lengths[indices]
        places = torch.arange(int(lengths.max()) if len(lengths) else 0)
        inside = places < lengths[:, None]  # [B, T]
        rows = torch.full(inside.shape, pad, dtype=torch.int64)
        rows[inside] = self.tokens[(starts[:, None] + places)[inside]]
        return rows, lengths


def batches_by_length(
    lengths: torch.Tensor, *, size: int | None = None, tokens: int | None = None
) -> list[torch.Tensor]:
    """Numbers of sequences in batches of nearly one length, short ones first.

    Arguments:
        lengths: int64 [N].
        size: most sequences a batch.
        tokens: most tokens a batch, padding included; a longer sequence is a batch alone.

    Every number is in one batch; sequences of one length keep their order. Raises ValueError where both
    limits are missing or one is below 1.
    """
    if size is None and tokens is None:
        raise ValueError("batches_by_length: size or tokens is needed")
    for name, value in (("size", size), ("tokens", tokens)):
        if value is not None and value < 1:
            raise ValueError(f"batches_by_length: {name} must be at least 1, got {value}")
    order = torch.argsort(lengths, stable=True)
    found: list[torch.Tensor] = []
    begin = 0
    ordered = lengths[order].tolist()
    for place, length in enumerate(ordered):
        count = place - begin + 1
        if count > 1 and ((size and count > size) or (tokens and count * length > tokens)):
            found.append(order[begin:place])
            begin = place
    return [*found, order[begin:]] if len(ordered) else []
