"""Factorized embedding: a table of rows that is never formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..formats import balanced_modes, covering_modes
from ..plan.embedding import chain_macs
from ..plan.embedding_geometry import EmbeddingGeometry
from .base import FactorizedLayer, decomposed, dtype_from_name, dtype_name, register_layer, structure_of

_MODES = 3


def embedding_modes(
    shape: Sequence[int],
    in_modes: Sequence[int] | None = None,
    out_modes: Sequence[int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """``in_modes`` (of the dimension) and ``out_modes`` (of the vocabulary, padded up) where none are given.

    >>> embedding_modes((17200, 256))
    {'in_modes': (4, 8, 8), 'out_modes': (26, 26, 26)}
    """
    count = len(in_modes or out_modes or (1,) * _MODES)
    return {
        "in_modes": tuple(in_modes or balanced_modes(shape[1], count)),
        "out_modes": tuple(out_modes or covering_modes(shape[0], count)),
    }


class FactorizedTable(FactorizedLayer):
    """What the embedding and the embedding bag share.

    Their ``prefer`` is "memory" unless it is set to "latency": no table is kept.
    """

    kind: ClassVar[str] = "embedding"
    dense_class: ClassVar[type[nn.Module]]
    geometry: EmbeddingGeometry

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: str = "ttm",
        rank: Any,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: {argument} must be an int >= 1, got {value!r}")
        if padding_idx is not None and (
            type(padding_idx) is not int or not -num_embeddings <= padding_idx < num_embeddings
        ):
            raise ValueError(
                f"{name}: padding_idx must be an int in [{-num_embeddings}, {num_embeddings}) or None, "
                f"got {padding_idx!r}"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.geometry = EmbeddingGeometry(num_embeddings, self.padding_idx)
        shape = (num_embeddings, embedding_dim)
        structure = embedding_modes(shape, in_modes, out_modes)
        self.weight = self._make_weight(shape, format, rank, device, dtype, structure)
        # A kept table would be faster to gather from, and take the memory that the factors are there to save.
        self.prefer = "memory"
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random cores for a dense table of variance ``2 / (num_embeddings + embedding_dim)`` (Glorot)."""
        self.weight.reset_parameters(2.0 / (self.num_embeddings + self.embedding_dim))

    @classmethod
    def _from_dense(
        cls, source: nn.Module, caller: str, format: str, rank: Any, options: dict[str, Any], **more: Any
    ) -> Self:
        name = f"{cls.__name__}.{caller}"
        if not isinstance(source, cls.dense_class):
            raise TypeError(
                f"{name}: expected a torch.nn.{cls.dense_class.__name__}, got {type(source).__name__}"
            )
        dense: Any = source
        if reason := dense_refusal(dense):
            raise ValueError(f"{name}: {reason}")
        if "input_order" in options:
            raise TypeError(f"{name}: unknown option 'input_order'")
        shape = (dense.num_embeddings, dense.embedding_dim)
        options = {**options, **embedding_modes(shape, options.get("in_modes"), options.get("out_modes"))}
        made = decomposed(name, dense.weight, format, cls.kind, rank, options)
        given = {**more, **made.structure, "format": format, "rank": made.rank, "device": "meta"}
        layer = cls(*shape, dense.padding_idx, **given)
        layer._take_dense(source, made)
        return layer

    @property
    def input_form(self) -> str:
        return "of indices, int64 or int32"

    def check_input(self, x: Tensor) -> None:
        name = type(self).__name__
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: x must be a tensor {self.input_form}, got {x.dtype}")
        core = self.weight.factors[0]
        if x.device != core.device:
            raise ValueError(f"{name}: x must be on the weight's device {core.device}, got {x.device}")

    def as_batch(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 0 else x

    def macs(self, input_shape: Sequence[int]) -> int:
        """Multiply-adds for random indices of ``input_shape``, products of leading cores once."""
        return chain_macs(self.weight.factors, math.prod(input_shape), shared=True)

    def dense_macs(self, input_shape: Sequence[int]) -> int:
        """0: a dense table is only read."""
        return 0

    def to_sequential(self) -> nn.Sequential:
        """The dense layer: torch.nn has none for the cores of a table."""
        sequence = nn.Sequential(self.to_dense())
        sequence.training = self.training
        return sequence

    def _dense_table(self) -> Tensor:
        # Outside autocast: as of torch.nn.Embedding rows have the dtype of the weights.
        with torch.autocast(self.weight.factors[0].device.type, enabled=False):
            return self.geometry.prepare(self.weight.to_dense())

    def config(self) -> dict[str, Any]:
        return {
            "type": type(self).__name__,
            "format": self.format,
            "rank": list(self.rank) if isinstance(self.rank, tuple) else self.rank,
            "structure": self.weight.structure,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "dtype": dtype_name(self.weight.factors[0].dtype),
        }

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], device: torch.device | str | None) -> Self:
        rank = config["rank"]
        return cls(
            config["num_embeddings"],
            config["embedding_dim"],
            config["padding_idx"],
            format=config["format"],
            rank=tuple(rank) if isinstance(rank, list) else rank,
            device=device,
            dtype=dtype_from_name(config["dtype"]),
            **structure_of(config),
            **cls._more(config),
        )

    @classmethod
    def _more(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        text = f"{self.num_embeddings}, {self.embedding_dim}{padding}, format={self.format}, rank={self.rank}"
        return text + (f", plan={self.plan}" if self.plan else "")


def dense_refusal(source: Any) -> str | None:
    """Why a torch.nn.Embedding or EmbeddingBag has no factorized form, or None where it has one."""
    if source.max_norm is not None:
        return f"max_norm={source.max_norm} writes into rows, which a factorized table does not hold"
    if source.scale_grad_by_freq:
        return "scale_grad_by_freq scales gradients row by row, which factors do not have"
    if source.sparse:
        return "sparse=True asks for gradients row by row, which factors do not have"
    if getattr(source, "mode", "sum") == "max":
        return "mode 'max' is not linear in the rows"
    padding = source.padding_idx
    if padding is not None and not source.weight.is_meta and bool(source.weight.detach()[padding].any()):
        return f"the row of padding_idx={padding} is not zero, as a factorized table's is"
    return None


@register_layer
class FactorizedEmbedding(FactorizedTable):
    """:class:`torch.nn.Embedding` with a factorized table; input of any shape, int64 or int32.

    ``y[..., :] = W[x, :]`` with ``W`` the dense table of the cores, which is formed only where a plan keeps
    it or a batch reads most of it. The row of ``padding_idx`` is zero and takes no gradient.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in torch.nn.
        format: name of a format for embeddings.
        rank: int, tuple, or float in (0, 1], the fraction of the dense parameters.
        in_modes: modes of ``embedding_dim``; three, balanced, by default.
        out_modes: modes of the vocabulary, whose product may exceed ``num_embeddings``; as many as
            ``in_modes``, nearly equal, by default.

    Cost: of ``ops.ttm_embedding``.

    Raises:
        ValueError: an argument out of range, named.

    Source: Hrinchuk et al. 2020; Yin et al. 2021.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.Embedding

    @classmethod
    def from_embedding(
        cls, embedding: nn.Module, format: str = "ttm", rank: Any = None, **options: Any
    ) -> Self:
        """Decompose a :class:`torch.nn.Embedding`.

        Dtype, device, training flag and requires_grad are kept.

        Args:
            rank: int, tuple, float in (0, 1] (fraction of the dense parameters) or a rule of
                ``tensorcomp_ext.ranks``.
            options: passed to the format's ``from_dense``: ``in_modes``, ``out_modes``, and what its
                decomposition takes.

        Raises:
            TypeError: another kind of layer.
            ValueError: max_norm, scale_grad_by_freq, sparse, a padding row that is not zero; NaN or Inf in
                the weight, a rank that does not fit.
        """
        return cls._from_dense(embedding, "from_embedding", format, rank, options)

    def to_dense(self) -> nn.Module:
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return self._fill(dense, self._dense_table())
