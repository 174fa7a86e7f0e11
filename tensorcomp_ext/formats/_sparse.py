"""What weights share that are a low-rank part and a sparse one, in training and packed for inference."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Format, Rank, Table, check_factor, format_names, get_format
from .forms import TwoFactor
from .merge import MatrixCut, matrix_cut

NO_LOW_RANK = "none"
"""In the place of a format's name: the weight is its sparse part alone."""
MOVED = 32
"""Multiply-adds that take as long as to write an entry of the low-rank part and to read it again."""

_DEFAULTS = {"linear": "svd", "conv": "tucker2"}


class LowRankOptions:
    """Format, shape and structure of the low-rank part of a weight.

    Args:
        owner: name of the format that has the part, for messages.
        shape: of the dense weight.
        low_rank: name of the part's format, "none", or None for the default of the kind of layer. "svd"
            takes a kernel as the matrix ``[T, S K]``.
        structure: options of that format.

    Raises:
        ValueError: a format that is not for such a weight. TypeError: options where there is no such part.
    """

    def __init__(self, owner: str, shape: Sequence[int], low_rank: str | None, **structure: Any) -> None:
        if not 2 <= len(shape) <= 5:
            raise ValueError(f"{owner}: shape must be [M, N] or [T, S, *kernel], got {list(shape)}")
        kind = "linear" if len(shape) == 2 else "conv"
        self.name = _DEFAULTS[kind] if low_rank is None else low_rank
        self.structure = structure
        self.shape = tuple(shape)
        self.cls: type[Format] | None = None
        if self.name == NO_LOW_RANK:
            if structure:
                raise TypeError(f"{owner}: takes no option {next(iter(structure))!r} without a low-rank part")
            return
        if self.name == "svd" and kind == "conv":
            kind, self.shape = "linear", (shape[0], math.prod(shape[1:]))
        names = [n for n in format_names(kind) if not issubclass(get_format(n), SparseFormat)]
        if self.name not in names:
            raise ValueError(
                f"{owner}: low_rank must be a format without a sparse part for {kind} layers, "
                f"{', '.join(names)} or {NO_LOW_RANK}, got {self.name!r}"
            )
        self.cls = get_format(self.name, kind)

    def check_rank(self, owner: str, rank: Rank) -> Rank:
        """The rank in canonical form; ``()`` without a low-rank part."""
        if self.cls is not None:
            return self.cls.check_rank(self.shape, rank, **self.structure)
        if not isinstance(rank, (tuple, list)) or len(rank):
            raise ValueError(f"{owner}: rank must be () without a low-rank part, got {rank!r}")
        return ()

    def factor_shapes(self, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """Shapes of the low-rank part's factors."""
        return () if self.cls is None else self.cls.factor_shapes(self.shape, rank, **self.structure)

    def of(self, factors: Sequence[Tensor]) -> Format | None:
        """The low-rank part made of these factors."""
        return None if self.cls is None else self.cls._of(factors, self.shape, self.structure)


class SparseFormat(Format):
    """A weight with a part in a low-rank format and a sparse part, as matrices ``[T, S K]`` of a kernel.

    Args:
        low_rank: the low-rank part, or None.
        shape: of the dense weight.

    Raises:
        ValueError: a low-rank part of another shape, or one that has a sparse part itself.
    """

    layers: ClassVar[frozenset[str]] = frozenset({"conv", "linear"})
    grouped: ClassVar[bool] = True
    low_rank: Format | None
    kept_names: ClassVar[tuple[str, ...]]
    """Parameters of the sparse part."""
    buffer_names: ClassVar[tuple[str, ...]]
    """Buffers that say where its entries belong."""

    def __init__(self, low_rank: Format | None, shape: Sequence[int]) -> None:
        super().__init__()
        self._shape = torch.Size(shape)
        if low_rank is not None:
            matrix = (shape[0], math.prod(shape[1:]))
            if isinstance(low_rank, SparseFormat):
                raise ValueError(
                    f"{self.name}: low_rank must have no sparse part itself, got {low_rank.name!r}"
                )
            if tuple(low_rank.shape) not in (tuple(shape), matrix):
                raise ValueError(
                    f"{self.name}: low_rank must have the shape {list(shape)}, got {list(low_rank.shape)}"
                )
        self.low_rank = low_rank
        inner = () if low_rank is None else low_rank.factor_names
        self.factor_names = (*(f"low_rank.{name}" for name in inner), *self.kept_names)
        # Planned here and not at each call, which torch.compile would trace through the search.
        self._cut = None if low_rank is None else _worth_it(low_rank)

    # --- the parts -----------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``[M, N]``, of a kernel ``[T, S K]``."""
        return self._shape[0], math.prod(self._shape[1:])

    @property
    def rank(self) -> Rank:
        return () if self.low_rank is None else self.low_rank.rank

    @property
    def low_rank_name(self) -> str:
        """Name of the low-rank part's format, or "none"."""
        return NO_LOW_RANK if self.low_rank is None else self.low_rank.name

    @property
    def factors(self) -> tuple[Tensor, ...]:
        inner = () if self.low_rank is None else self.low_rank.factors
        return (*inner, *(getattr(self, name) for name in self.kept_names))

    def tables(self) -> tuple[Table, ...]:
        inner = () if self.low_rank is None else self.low_rank.tables()
        parameters: Any = self._parameters
        buffers: Any = self._buffers
        return (*inner, (parameters, self.kept_names), (buffers, self.buffer_names))

    @property
    @abstractmethod
    def nnz(self) -> int:
        """Entries of the sparse part."""

    @property
    def counted(self) -> int:
        """The factors and the entries of the sparse part, without indices."""
        return (0 if self.low_rank is None else self.low_rank.numel) + self.nnz

    def factor_pair(self) -> TwoFactor | None:
        """The low-rank part as a product of two matrices; None where it is none, or not at a good price."""
        if self.low_rank is None or self._cut is None:
            return None
        return self._cut(self.low_rank.lower())

    def low_rank_dense(self) -> Tensor | None:
        """The low-rank part, dense, of the weight's shape; None where there is none."""
        return None if self.low_rank is None else self.low_rank.to_dense().reshape(self._shape)

    # --- costs ---------------------------------------------------------------------------------------------

    def macs(self, in_positions: int, out_positions: int) -> int:
        """Those of the low-rank part, and one for each entry of the sparse one at every output position."""
        low = 0
        if self.low_rank is not None:
            # Of a kernel taken as a matrix the first factor is the convolution.
            first = in_positions if len(self.low_rank.shape) == len(self._shape) else out_positions
            low = self.low_rank.macs(first, out_positions)
        return low + out_positions * self.nnz

    def rebuild_macs(self) -> int:
        if self.low_rank is None:
            return 0
        return self.low_rank.rebuild_macs() if self._cut is None else self._cut.macs

    # --- making --------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def _split(cls, shape: Sequence[int], structure: Mapping[str, Any]) -> LowRankOptions:
        """The options of the low-rank part among those of the format, which are checked."""

    @classmethod
    def check_rank(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> Rank:
        return cls._split(shape, structure).check_rank(cls.name, rank)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, low_rank={self.low_rank_name}, rank={self.rank}"


def _worth_it(low_rank: Format) -> MatrixCut | None:
    """The cut of a low-rank part, unless its product is so much more work than another order of products.

    A weight that is not cut is written once more, and read again, before the sparse part goes into it.
    """
    cut = matrix_cut(low_rank.lower())
    limit = low_rank.rebuild_macs() + MOVED * math.prod(low_rank.shape)
    return cut if cut is not None and cut.macs <= limit else None


def check_sparse(name: str, sparse: object, low_rank: Format | None) -> Tensor:
    """Raise unless ``sparse`` is a weight that goes with the low-rank part."""
    dims = sparse.dim() if isinstance(sparse, Tensor) else 2
    if isinstance(sparse, Tensor) and not 2 <= dims <= 5:
        raise ValueError(f"{name}: sparse must be [M, N] or [T, S, *kernel], got {list(sparse.shape)}")
    found = check_factor(name, sparse, "sparse", [None] * dims, "[M, N] or [T, S, *kernel]")
    if low_rank is not None:
        check_like(name, found, "sparse", low_rank)
    return found


def check_like(name: str, tensor: Tensor, argument: str, low_rank: Format) -> None:
    """Raise unless ``tensor`` has dtype and device of the low-rank part."""
    like = low_rank.factors[0]
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: {argument} must have low_rank's dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: {argument} must be on low_rank's device {like.device}, got {tensor.device}"
        )
