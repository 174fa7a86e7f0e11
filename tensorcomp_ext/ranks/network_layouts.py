"""Ranks of the formats whose weight is a network of factors: CP, Tucker, trains and rings.

Sizes, limits and costs are those of the format classes themselves, so they are written down once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .. import decompose
from ..decompose.chain_ranks import largest_ring_rank
from ..formats import get_format
from ..formats._chains import chained
from ..formats._network import NetworkFormat
from .layouts import Pixels, RankLayout, Ranks, Spectrum, register_layout


class NetworkLayout(RankLayout):
    """Ranks of a weight in a format of labelled factors; `options` as its `from_dense` takes them."""

    int_is_bound: ClassVar[bool] = True

    def __init__(self, weight: Tensor, **options: Any) -> None:
        super().__init__(weight)
        found = get_format(self.format)
        assert issubclass(found, NetworkFormat)
        self.cls: type[NetworkFormat] = found
        self.structure = {key: value for key, value in options.items() if key not in found.method_options}
        self.folding = found.fold(self.shape, **self.structure)
        self.names = found.wire(self.folding).rank_names
        self._limits = found.limits(self.folding)

    @property
    def limits(self) -> Ranks:
        return self._limits

    def params(self, ranks: Ranks) -> int:
        return sum(map(math.prod, self.cls.factor_shapes(self.shape, ranks, **self.structure)))

    def macs(self, ranks: Ranks, pixels: Pixels) -> int:
        # A format on the meta device has shapes and no memory.
        return self.cls.empty(self.shape, ranks, device="meta", **self.structure).macs(*pixels)

    def scaled(self, fraction: float) -> Ranks:
        largest = max(1, math.floor(fraction * max(self._limits, default=1)))
        return tuple(min(largest, limit) for limit in self._limits)

    def inner(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return self.cls.without_boundary(tuple(ranks), len(self._limits))

    def folded(self) -> Tensor:
        """The weight as (*out_modes, *in_modes, *kernel)."""
        return self.folding.tensor(self.weight.detach())

    def spectra(self) -> list[Spectrum]:
        raise ValueError(
            f"{self.format}: rank must be given: no unfolding decides the rank of {self.format}, as rules "
            f"that read spectra (vbmf, energy) need; pass rank=... or a budget such as tc.ranks.Ratio(0.25)"
        )


class _TrainLayout(NetworkLayout):
    def useful(self, ranks: Ranks, place: int) -> bool:
        # A core unfolds to R_{k-1} I_k rows: a rank beyond them, or beyond those of the next core, is idle.
        shapes = self.cls.factor_shapes(self.shape, ranks, **self.structure)
        rows, columns = math.prod(shapes[place][:-1]), math.prod(shapes[place + 1][1:])
        return ranks[place] <= min(rows, columns)


def _sequential(tensor: Tensor) -> list[Spectrum]:
    """Spectra of the unfoldings of a train: the first k modes against the rest."""
    found = []
    for k in range(1, tensor.ndim):
        matrix = tensor.reshape(math.prod(tensor.shape[:k]), -1)
        found.append(Spectrum(decompose.singular_values(matrix), (matrix.shape[0], matrix.shape[1])))
    return found


@register_layout
class CPLayout(NetworkLayout):
    """One rank for all modes: R·ΣI_n weights."""

    format = "cp"

    def pack(self, ranks: Ranks) -> int | Ranks:
        return ranks[0]


@register_layout
class TuckerLayout(NetworkLayout):
    """A rank for every mode, in proportion to its size under a budget: R_n = max(1, round(κ I_n))."""

    format = "tucker"

    def scaled(self, fraction: float) -> Ranks:
        return tuple(max(1, round(fraction * size)) for size in self._limits)

    def useful(self, ranks: Ranks, place: int) -> bool:
        return ranks[place] ** 2 <= math.prod(ranks)

    def spectra(self) -> list[Spectrum]:
        tensor = self.folded()
        return [
            Spectrum(decompose.singular_values(tensor, mode), (size, tensor.numel() // size))
            for mode, size in enumerate(tensor.shape)
        ]


@register_layout
class TTLayout(_TrainLayout):
    """The inner ranks of a train, uniform under a budget, clipped to what the modes can hold."""

    format = "tt"

    def spectra(self) -> list[Spectrum]:
        return _sequential(chained(self.folded(), self.folding))


@register_layout
class TTMLayout(_TrainLayout):
    """The inner ranks of a train over pairs of modes; of a kernel the taps come first."""

    format = "ttm"

    def spectra(self) -> list[Spectrum]:
        folding, tensor = self.folding, self.folded()
        count = len(folding.out_modes)
        pairs = [o * i for o, i in zip(folding.out_modes, folding.in_modes, strict=True)]
        order = [place for k in range(count) for place in (k, count + k)]
        taps = tensor.flatten(2 * count) if folding.kernel else tensor[..., None]
        return _sequential(taps.permute(2 * count, *order).reshape([folding.taps, *pairs]))[
            0 if folding.kernel else 1 :
        ]


class _RingLayout(NetworkLayout):
    def scaled(self, fraction: float) -> Ranks:
        # Beyond the largest rank of a full train a uniform ring holds every tensor.
        sizes = [math.prod(shape[1:-1]) for shape in self.cls.factor_shapes(self.shape, 1, **self.structure)]
        largest = max(1, math.floor(fraction * largest_ring_rank(sizes)))
        return tuple(min(largest, limit) for limit in self._limits)


@register_layout
class TRLayout(_RingLayout):
    """The ranks of a ring, uniform under a budget."""

    format = "tr"


@register_layout
class TRMatrixLayout(_RingLayout):
    """The ranks of a ring over pairs of modes, uniform under a budget."""

    format = "tr_matrix"
