"""Low-rank + sparse, packed: factors, the entries that are left, and where they belong in few bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..ops import PackedSparse, check_packed, pack_sparse, unpack_mask
from ..ops._transforms import with_numbers
from ..ops.lowrank_sparse_packing import takes_bitmap
from ..reference.lowrank_sparse_linear import coordinates, segments_of
from ._sparse import LowRankOptions, SparseFormat, check_like
from .base import Format, Rank, as_parameter, register_format
from .forms import PackedSum

Positions = Literal["bitmap", "columns"]
DENSITY = 0.1
"""Share of the entries kept where none is given."""


@register_format("lowrank_sparse_packed")
class PackedLowRankSparse(SparseFormat):
    """``W = L + S``: L in another format, S as the entries it has and where they belong. For inference.

    Ranks and their options are those of L. Positions are one bit an entry of the weight ("bitmap") or 16 bits
    an entry of S ("columns"), whichever is smaller, and 32 bits a row. Stored weights: ``numel(L) + nnz(S)``.

    Args:
        low_rank: L; None for ``W = S``.
        sparse: S as :func:`..ops.pack_sparse` packs it, of a kernel as the matrix ``[T, S K]``.
        shape: of the dense weight; None for that of L.

    Options of the classmethods: ``low_rank``, as of :class:`.LowRankSparse`; ``nnz``, or ``density``, the
    share of entries kept (0.1); ``positions``, which of the two, else the smaller; those of the format of L.
    Options of :meth:`from_dense`: besides, those of :meth:`.LowRankSparse.from_dense`.

    Raises:
        ValueError, TypeError: parts that do not fit together, or a packed matrix that is none.

    Source: Hawkins et al. 2021 (low-rank + sparse tensor compression).
    """

    kept_names: ClassVar[tuple[str, ...]] = ("values",)
    buffer_names: ClassVar[tuple[str, ...]] = ("offsets", "positions")
    values: nn.Parameter
    offsets: Tensor
    positions: Tensor

    def __init__(
        self, low_rank: Format | None, sparse: PackedSparse, shape: Sequence[int] | None = None
    ) -> None:
        if shape is None:
            if low_rank is None:
                raise ValueError(f"{self.name}: shape is needed without a low-rank part")
            shape = low_rank.shape
        super().__init__(low_rank, shape)
        if low_rank is not None:
            check_like(self.name, sparse.values, "sparse.values", low_rank)
        if not sparse.values.is_meta:
            check_packed(sparse, self.name)
        if sparse.shape != self.matrix_shape:
            raise ValueError(f"{self.name}: sparse must be {list(self.matrix_shape)}, got {sparse.shape}")
        self.values = as_parameter(sparse.values)
        self.register_buffer("offsets", sparse.offsets)
        self.register_buffer("positions", sparse.positions)

    # --- the weight ----------------------------------------------------------------------------------------

    @property
    def packed(self) -> PackedSparse:
        """S as the ops take it."""
        return PackedSparse(self.values, self.offsets, self.positions, self.matrix_shape[1])

    @property
    def nnz(self) -> int:
        return self.values.shape[0]

    @property
    def stored_bytes(self) -> int:
        low = 0 if self.low_rank is None else self.low_rank.numel
        places = sum(b.numel() * b.element_size() for b in (self.offsets, self.positions))
        return (low + self.nnz) * self.values.element_size() + places

    def sparse_dense(self) -> Tensor:
        """S, dense, of the weight's shape."""
        rows, columns = self.matrix_shape
        values = self.values
        if self.nnz == 0:
            return values.new_zeros(self.shape)
        if self.positions.dtype == torch.uint8:
            kept = unpack_mask(self.positions, columns).flatten()
            if not self._counts_bits():
                # Which value an entry has; shapes do not depend on the bits, so that graphs can hold this.
                place = (kept.cumsum(0, dtype=torch.int32) - 1).clamp(min=0)
                return torch.where(kept, values.index_select(0, place), 0).reshape(self.shape)
            entries = kept.nonzero().squeeze(1)
        else:
            row, column = coordinates(self.offsets, self.positions, rows, columns)
            entries = row * columns + column
        return values.new_zeros(rows * columns).index_put((entries,), values).reshape(self.shape)

    def _counts_bits(self) -> bool:
        """Whether the places of the bits may be looked up: for no graph, and no device is waited for."""
        traces = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        return not traces and self.positions.is_cpu and with_numbers(self.positions) is not None

    def to_dense(self) -> Tensor:
        """W; cost :meth:`rebuild_macs`."""
        low, sparse = self.low_rank_dense(), self.sparse_dense()
        return sparse if low is None else low + sparse

    def rebuild_macs(self) -> int:
        return 0 if self.low_rank is None else self.low_rank.rebuild_macs()

    def lower(self) -> PackedSum:
        return PackedSum(self.factor_pair(), self.packed, self.low_rank is not None)

    def finalized(self) -> Self:
        return self

    # --- making --------------------------------------------------------------------------------------------

    @property
    def structure(self) -> dict[str, Any]:
        inner = {} if self.low_rank is None else self.low_rank.structure
        kind = "bitmap" if self.positions.dtype == torch.uint8 else "columns"
        return {"low_rank": self.low_rank_name, "nnz": self.nnz, "positions": kind, **inner}

    @classmethod
    def _split(cls, shape: Sequence[int], structure: Mapping[str, Any]) -> LowRankOptions:
        inner = {k: v for k, v in structure.items() if k not in ("nnz", "density", "positions", "low_rank")}
        return LowRankOptions(cls.name, shape, structure.get("low_rank"), **inner)

    @classmethod
    def _count(cls, shape: Sequence[int], structure: Mapping[str, Any]) -> int:
        """Entries of S by the options."""
        entries, nnz = math.prod(shape), structure.get("nnz")
        if nnz is None:
            density = structure.get("density", DENSITY)
            if not isinstance(density, float) or not 0.0 <= density <= 1.0:
                raise ValueError(f"{cls.name}: density must be a float in [0, 1], got {density!r}")
            return round(density * entries)
        if type(nnz) is not int or not 0 <= nnz <= entries:
            raise ValueError(f"{cls.name}: nnz must be an int in [0, {entries}], got {nnz!r}")
        return nnz

    @classmethod
    def factor_shapes(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> tuple[tuple[int, ...], ...]:
        return (*cls._split(shape, structure).factor_shapes(rank), (cls._count(shape, structure),))

    @classmethod
    def _of(cls, factors: Sequence[Tensor], shape: Sequence[int], structure: Mapping[str, Any]) -> Self:
        *inner, values = factors
        low_rank = cls._split(shape, structure).of(inner)
        sparse = _spread(values, shape[0], math.prod(shape[1:]), structure.get("positions"))
        return cls(low_rank, sparse, shape)

    @torch.no_grad()
    def reset_parameters(
        self, variance: float | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        """Random L and entries of S, half the variance of a dense entry each on average.

        Args:
            variance: of the dense weight's entries; ``2 / fan_in`` when None.

        Raises:
            ValueError: a variance of 0 or below.
        """
        if variance is None:
            variance = 2.0 / math.prod(self.shape[1:])
        if not variance > 0:
            raise ValueError(f"{self.name}: variance must be above 0, got {variance}")
        share = variance
        if self.low_rank is not None:
            share = variance / 2
            self.low_rank.reset_parameters(share, generator=generator)
        density = max(self.nnz, 1) / math.prod(self.shape)
        self.values.normal_(0.0, math.sqrt(share / density), generator=generator)

    @classmethod
    def from_dense(cls, weight: Tensor, rank: Rank, **options: Any) -> Self:
        """Decompose a weight and keep the largest entries of what L leaves, without training.

        Raises:
            ValueError, TypeError: as :meth:`.LowRankSparse.from_dense`.
        """
        from .lowrank_sparse import LowRankSparse, largest

        if "mode" in options:
            raise TypeError(f"{cls.name}: takes no option 'mode': the packed form is additive")
        count = cls._count(weight.shape, options)
        positions = options.pop("positions", None)
        for name in ("nnz", "density"):
            options.pop(name, None)
        if options.get("init") == "masking":
            options.setdefault("outliers", count / weight.numel())
        made = LowRankSparse.from_dense(weight, rank, **options)
        kept = largest(made.sparse, count)
        packed = pack_sparse(made.sparse.detach(), kept, positions=positions)
        return cls(made.low_rank, packed, weight.shape)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As every module, and refuses positions that lie outside the weight, which kernels would follow."""
        wrong = self.check_state(state_dict, prefix)
        if wrong is not None:
            error_msgs.append(wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> str | None:
        """Positions outside the weight, or that do not go with the offsets."""
        found = [state.get(prefix + name) for name in ("values", "offsets", "positions")]
        if not all(isinstance(t, Tensor) and not t.is_meta for t in found):
            return None
        values, offsets, positions = found
        shapes = [t.shape for t in found if t is not None]
        if shapes != [self.values.shape, self.offsets.shape, self.positions.shape]:
            return None  # which torch.nn.Module says itself
        assert values is not None and offsets is not None and positions is not None
        packed = PackedSparse(
            values.contiguous(), offsets.contiguous(), positions.contiguous(), self.matrix_shape[1]
        )
        try:
            check_packed(packed, prefix.rstrip(".") or self.name)
        except (ValueError, TypeError) as error:
            return str(error)
        return None


def _spread(values: Tensor, rows: int, columns: int, positions: Positions | None) -> PackedSparse:
    """A packed matrix of these values, spread over it evenly: valid until real positions are loaded."""
    nnz, device = values.shape[0], values.device
    bitmap = takes_bitmap(rows, columns, nnz) if positions is None else positions == "bitmap"
    if positions not in (None, "bitmap", "columns"):
        raise ValueError(f"positions must be 'bitmap' or 'columns', got {positions!r}")
    segments = segments_of(columns)
    if values.is_meta:
        offsets = torch.empty(rows * segments + 1, dtype=torch.int32, device=device)
        shape = (rows, (columns + 7) // 8) if bitmap else (nnz,)
        dtype = torch.uint8 if bitmap else torch.int16
        return PackedSparse(values, offsets, torch.empty(shape, dtype=dtype, device=device), columns)
    entries = torch.arange(nnz, device=device) * (rows * columns) // max(nnz, 1)
    mask = torch.zeros(rows * columns, dtype=torch.bool, device=device)
    mask[entries] = True
    mask = mask.reshape(rows, columns)
    zeros = torch.zeros(rows, columns, dtype=values.dtype, device=device)
    return pack_sparse(zeros, mask, positions="bitmap" if bitmap else "columns")._replace(values=values)
