"""What all formats share whose weight is a network of factors with labelled modes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from ..ops._contraction_products import contraction
from ..ops.contract import native_support
from ._modes import Folding, fold
from .base import Format, Merge, Rank, as_parameter, check_factor, clip_rank
from .forms import Network


@dataclass(frozen=True)
class Wiring:
    """How the factors of a network hang together: every mode of every factor has a label."""

    names: tuple[str, ...]
    """Attribute names of the factors."""
    labels: tuple[tuple[int, ...], ...]
    """One label for each mode of each factor."""
    outputs: tuple[int, ...]
    """Labels of the out modes."""
    inputs: tuple[int, ...]
    """Labels of the in modes, in the order in which they index the columns."""
    taps: tuple[int, ...]
    """Labels of the kernel's modes."""
    sizes: Mapping[int, int]
    """Sizes of the labels that do not depend on the rank."""
    ranks: tuple[int, ...]
    """Labels of the ranks, in the order in which the format takes them."""

    @property
    def rank_names(self) -> tuple[str, ...]:
        """How messages call the ranks."""
        return ("R",) if len(self.ranks) == 1 else tuple(f"R_{place}" for place in range(len(self.ranks)))


class Part(NamedTuple):
    """Some of the factors, to be contracted to a tensor with the labels ``result``."""

    places: tuple[int, ...]
    result: tuple[int, ...]


class NetworkFormat(Format):
    """A weight as the sum over all rank labels of the products of its factors' entries.

    Args:
        factors: tensors of the shapes of :meth:`factor_shapes`.
        shape: of the dense weight.
        structure: ``in_modes``, ``out_modes``, ``input_order``; see :func:`._modes.fold`.

    Raises:
        ValueError, TypeError: factors or options that do not fit.
    """

    modes_a_side: ClassVar[int] = 3
    """Balanced modes into which each side of a matrix is folded where none are given."""
    paired: ClassVar[bool] = False
    """Whether every factor holds an out mode and an in mode."""
    method_options: ClassVar[frozenset[str]] = frozenset()
    """Options of :meth:`from_dense` for its decomposition."""

    def __init__(self, factors: Sequence[Tensor], shape: Sequence[int], **structure: Any) -> None:
        super().__init__()
        self.folding = folding = self.fold(shape, **structure)
        self.wiring = wiring = self.wire(folding)
        self.factor_names = wiring.names
        sizes = _bound_sizes(self.name, wiring, factors)
        for name, factor in zip(wiring.names, factors, strict=True):
            self.register_parameter(name, as_parameter(factor))
        # Planned here and not at each call, which torch.compile would trace through the search.
        self._rebuild = contraction(wiring.labels, sizes, wiring.outputs + wiring.inputs + wiring.taps)
        self._rebuild_last = contraction(wiring.labels, sizes, wiring.outputs + wiring.taps + wiring.inputs)
        self._parts = {
            key: (part, contraction([wiring.labels[place] for place in part.places], sizes, part.result))
            for key, part in self.parts(folding, wiring).items()
        }

    @classmethod
    def fold(cls, shape: Sequence[int], **structure: Any) -> Folding:
        """The modes of a dense ``shape`` under these options."""
        kind = "linear" if len(shape) == 2 else "conv"
        if kind not in cls.layers:
            raise ValueError(f"{cls.name}: shape must be [M, N], got {list(shape)}")
        padded = "embedding" in cls.layers and len(shape) == 2
        return fold(cls.name, shape, cls.modes_a_side, paired=cls.paired, padded=padded, **structure)

    @classmethod
    @abstractmethod
    def wire(cls, folding: Folding) -> Wiring:
        """Factors and labels for these modes."""

    @classmethod
    def parts(cls, folding: Folding, wiring: Wiring) -> dict[str, Part]:
        """What :meth:`lower` merges."""
        return {}

    @classmethod
    @abstractmethod
    def limits(cls, folding: Folding) -> tuple[int, ...]:
        """The largest useful value of each rank."""

    @classmethod
    @abstractmethod
    def decompose(
        cls, tensor: Tensor, folding: Folding, ranks: tuple[int, ...], **options: Any
    ) -> Sequence[Tensor]:
        """The factors of a weight folded to ``(*out_modes, *in_modes, *kernel)``."""

    @classmethod
    def decompose_observed(
        cls, tensor: Tensor, observed: Tensor, folding: Folding, ranks: tuple[int, ...], **search: Any
    ) -> Sequence[Tensor]:
        """The factors of a folded weight of which the entries count where ``observed`` is True.

        ``search``: iterations and tolerance, as :func:`...decompose.masked_fit` takes them.
        """
        raise ValueError(f"{cls.name}: there is no fit of the observed entries in this format")

    @classmethod
    def from_dense(cls, weight: Tensor, rank: Rank, **options: Any) -> Self:
        """Decompose a weight; see the class for the options.

        Raises:
            ValueError: NaN or Inf in ``weight``, a rank or modes that do not fit. TypeError: unknown option.
        """
        method = {key: options.pop(key) for key in cls.method_options & set(options)}
        folding = cls.fold(weight.shape, **options)
        ranks = cls._ranks(folding, rank)
        weight = weight.detach()
        return cls(cls.decompose(folding.tensor(weight), folding, ranks, **method), weight.shape, **options)

    @classmethod
    def from_observed(
        cls,
        weight: Tensor,
        observed: Tensor,
        rank: Rank,
        *,
        iterations: int = 1500,
        tol: float = 1e-7,
        **options: Any,
    ) -> Self:
        folding = cls.fold(weight.shape, **options)
        if observed.shape != weight.shape:
            raise ValueError(f"{cls.name}: observed must be {list(weight.shape)}, got {list(observed.shape)}")
        tensor, seen = folding.tensor(weight.detach()), folding.tensor(observed)
        ranks = cls._ranks(folding, rank)
        found = cls.decompose_observed(tensor, seen, folding, ranks, iterations=iterations, tol=tol)
        return cls(found, weight.shape, **options)

    @classmethod
    def _of(cls, factors: Sequence[Tensor], shape: Sequence[int], structure: Mapping[str, Any]) -> Self:
        return cls(factors, shape, **structure)

    # --- ranks ---------------------------------------------------------------------------------------------

    @classmethod
    def check_rank(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> Rank:
        return cls.packed(cls._ranks(cls.fold(shape, **structure), rank))

    @classmethod
    def packed(cls, ranks: tuple[int, ...]) -> Rank:
        """Ranks as :attr:`rank` shows them."""
        return ranks

    @classmethod
    def without_boundary(cls, ranks: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Ranks that were written down with what goes without saying, reduced to ``count``."""
        return ranks

    @classmethod
    def _ranks(cls, folding: Folding, rank: Rank) -> tuple[int, ...]:
        """Every rank, clipped: an int is the largest that each may be."""
        wiring, limits = cls.wire(folding), cls.limits(folding)
        if not isinstance(rank, (tuple, list)):
            top = clip_rank(cls.name, "rank", rank, max(limits, default=1), "the largest useful one")
            return tuple(min(top, limit) for limit in limits)
        ranks = cls.without_boundary(tuple(rank), len(limits))
        if len(ranks) != len(limits):
            raise ValueError(
                f"{cls.name}: rank must be an int or {len(limits)} ints "
                f"({', '.join(wiring.rank_names)}), got {rank!r}"
            )
        return tuple(
            clip_rank(cls.name, what, each, limit, "the largest useful one")
            for what, each, limit in zip(wiring.rank_names, ranks, limits, strict=True)
        )

    @classmethod
    def factor_shapes(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> tuple[tuple[int, ...], ...]:
        folding = cls.fold(shape, **structure)
        wiring = cls.wire(folding)
        sizes = {**wiring.sizes, **dict(zip(wiring.ranks, cls._ranks(folding, rank), strict=True))}
        return tuple(tuple(sizes[label] for label in group) for group in wiring.labels)

    # --- the weight ----------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.folding.shape)

    @property
    def structure(self) -> dict[str, Any]:
        return self.folding.structure

    @property
    def sizes(self) -> dict[int, int]:
        """Size of every label."""
        return {
            label: size
            for group, factor in zip(self.wiring.labels, self.factors, strict=True)
            for label, size in zip(group, factor.shape, strict=True)
        }

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks, one or several."""
        sizes = self.sizes
        return tuple(sizes[label] for label in self.wiring.ranks)

    @property
    def rank(self) -> Rank:
        return self.packed(self.ranks)

    def bonds(self) -> dict[str, tuple[tuple[str, int], ...]]:
        wiring = self.wiring
        places = [
            (label, (name, dim))
            for name, labels in zip(wiring.names, wiring.labels, strict=True)
            for dim, label in enumerate(labels)
        ]
        return {
            rank: tuple(place for label, place in places if label == wanted)
            for rank, wanted in zip(wiring.rank_names, wiring.ranks, strict=True)
        }

    def to_dense(self) -> Tensor:
        """The dense weight, in the cheapest order of contraction; cost :meth:`rebuild_macs`."""
        folding = self.folding
        # From [*out modes, *in modes as stored, *taps].
        dense = self._rebuild(self.factors, (-1, folding.shape[1], *folding.kernel))
        return dense if dense.shape[0] == folding.shape[0] else dense[: folding.shape[0]]

    def to_dense_channels_last(self) -> Tensor:
        folding = self.folding
        # From [*out modes, *taps, *in modes].
        dense = self._rebuild_last(self.factors, (-1, *folding.kernel, folding.shape[1])).movedim(-1, 1)
        return dense if dense.shape[0] == folding.shape[0] else dense[: folding.shape[0]]

    def rebuild_macs(self) -> int:
        wiring = self.wiring
        return contraction(wiring.labels, self.sizes, wiring.outputs + wiring.inputs + wiring.taps).macs

    def rebuilds_natively(self) -> bool:
        return bool(self._rebuild.program) and native_support(self.factors).ok

    def merges(self) -> list[Merge]:
        factors, sizes, found = self.factors, self.sizes, []
        for part, contract in self._parts.values():
            if contract.steps:
                stored = [factors[place] for place in part.places]
                made = math.prod(sizes[label] for label in part.result)
                natively = bool(contract.program) and native_support(stored).ok
                moved = sum(factor.numel() for factor in stored) + made
                found.append(Merge(contract.macs, moved, len(contract.steps), natively))
        return found

    def network(self) -> Network:
        """The factors as a network from in modes to out modes."""
        wiring = self.wiring
        return Network(self.factors, wiring.labels, wiring.outputs, wiring.inputs)

    def merged(self, key: str, shape: Sequence[int]) -> Tensor:
        """The factors of a part of :meth:`parts` as one tensor of ``shape``; of one factor a view."""
        part, contract = self._parts[key]
        factors = self.factors
        return contract([factors[place] for place in part.places], shape)

    def extra_repr(self) -> str:
        options = "".join(f", {key}={tuple(value)}" for key, value in self.structure.items())
        return super().extra_repr() + options


def _bound_sizes(name: str, wiring: Wiring, factors: Sequence[Tensor]) -> dict[int, int]:
    """Sizes of all labels, with the ranks as the factors have them."""
    if len(factors) != len(wiring.names):
        raise ValueError(f"{name}: expected the factors {', '.join(wiring.names)}, got {len(factors)}")
    rank_names = dict(zip(wiring.ranks, wiring.rank_names, strict=True))
    sizes = dict(wiring.sizes)
    for argument, labels, factor in zip(wiring.names, wiring.labels, factors, strict=True):
        known = [label for label in labels if label in rank_names and label in sizes]
        letters = ", ".join(rank_names.get(label, str(sizes.get(label))) for label in labels)
        where = " and ".join(f"{rank_names[label]} = {sizes[label]}" for label in dict.fromkeys(known))
        expected = f"[{letters}]" + (f" with {where}" if where else "")
        check_factor(name, factor, argument, [sizes.get(label) for label in labels], expected)
        for label, size in zip(labels, factor.shape, strict=True):
            if sizes.setdefault(label, size) != size:  # one label twice in one factor
                raise ValueError(f"{name}: {argument} must be {expected}, got {list(factor.shape)}")
    return sizes
