"""Factorized embedding bag: sums and means of rows of a table that is never formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ..ops import ttm_embedding_bag
from ..ops._transforms import transformed
from .base import register_layer
from .embedding import FactorizedTable


@register_layer
class FactorizedEmbeddingBag(FactorizedTable):
    """:class:`torch.nn.EmbeddingBag` with a factorized table.

    Input as in torch.nn: indices ``[bags, size]``, or ``[n]`` with ``offsets``; weights of samples for mode
    "sum". The row of ``padding_idx`` counts in no bag. Plans are those of the rows.

    Args:
        num_embeddings, embedding_dim, mode, include_last_offset, padding_idx: as in torch.nn; ``mode`` "sum"
            or "mean".
        format, rank, in_modes, out_modes: as of :class:`FactorizedEmbedding`.

    Cost: of ``ops.ttm_embedding_bag``.

    Raises:
        ValueError: an argument out of range, named.

    Source: Hrinchuk et al. 2020; Yin et al. 2021.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        format: str = "ttm",
        rank: Any,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in ("sum", "mean"):
            raise ValueError(f"FactorizedEmbeddingBag: mode must be 'sum' or 'mean', got {mode!r}")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            format=format,
            rank=rank,
            in_modes=in_modes,
            out_modes=out_modes,
            device=device,
            dtype=dtype,
        )
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def from_embedding_bag(
        cls, bag: nn.Module, format: str = "ttm", rank: Any = None, **options: Any
    ) -> Self:
        """Decompose a :class:`torch.nn.EmbeddingBag`; see :meth:`FactorizedEmbedding.from_embedding`.

        Raises:
            TypeError: another kind of layer.
            ValueError: as there; mode "max".
        """
        more = {key: getattr(bag, key, None) for key in ("mode", "include_last_offset")}
        return cls._from_dense(bag, "from_embedding_bag", format, rank, options, **more)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        name = None
        # Where nothing is traced a plan is chosen, by the number of indices.
        if type(input) is Tensor and not (torch.compiler.is_compiling() or input.is_meta or transformed()):
            self.check_input(input)
            training = self._needs_gradients(input)
            name = self._choose(input, (input.shape, input.dtype, torch.get_num_threads(), training)).name
            if name == "dense":
                return F.embedding_bag(
                    input,
                    self._table(training),
                    offsets,
                    mode=self.mode,
                    per_sample_weights=per_sample_weights,
                    include_last_offset=self.include_last_offset,
                    padding_idx=self.padding_idx,
                )
        return ttm_embedding_bag(
            input,
            self.weight.factors,
            offsets,
            num_embeddings=self.num_embeddings,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            padding_idx=self.padding_idx,
            include_last_offset=self.include_last_offset,
            backend="reference" if name == "staged" else None,
        )

    def _table(self, training: bool) -> Tensor:
        """The dense table: kept only for inference, and where memory may be spent."""
        if training or self.prefer == "memory":
            return self._dense_table()
        dtype = self.weight.factors[0].dtype
        (table,) = self.prepared("dense contiguous", dtype, lambda: (self._dense_table().contiguous(),))
        return table

    def to_dense(self) -> nn.Module:
        dense = nn.EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            device="meta",
        )
        return self._fill(dense, self._dense_table())

    def config(self) -> dict[str, Any]:
        return {**super().config(), "mode": self.mode, "include_last_offset": self.include_last_offset}

    @classmethod
    def _more(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"mode": config["mode"], "include_last_offset": bool(config["include_last_offset"])}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"
