"""Ranks of weights with a sparse part: those of the low-rank part alone.

A budget of 0.1 is a tenth of the dense weights for the factors; what the sparse part keeps is decided in
training.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..formats._sparse import LowRankOptions
from ..formats.lowrank_sparse import OPTIONS
from .layouts import Pixels, RankLayout, Ranks, Spectrum, rank_layout, register_layout_maker


class NoRanks(RankLayout):
    """A weight without a low-rank part: whatever the rule, there is no rank to choose."""

    format = "lowrank_sparse"
    names: tuple[str, ...] = ()
    int_is_bound: ClassVar[bool] = True

    @property
    def limits(self) -> Ranks:
        return ()

    def spectra(self) -> list[Spectrum]:
        return []

    def params(self, ranks: Ranks) -> int:
        return 0

    def macs(self, ranks: Ranks, pixels: Pixels) -> int:
        return 0

    def scaled(self, fraction: float) -> Ranks:
        return ()


@register_layout_maker("lowrank_sparse", "lowrank_sparse_packed")
def sparse_layout(weight: Tensor, *, low_rank: str | None = None, **options: Any) -> RankLayout:
    """The layout of the low-rank part; ``options`` as those of the format's ``from_dense``."""
    inner = {key: value for key, value in options.items() if key not in OPTIONS}
    part = LowRankOptions("lowrank_sparse", tuple(weight.shape), low_rank, **inner)
    if part.cls is None:
        return NoRanks(weight)
    return rank_layout(weight.reshape(part.shape), part.name, **inner)
