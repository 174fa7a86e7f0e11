"""What rank selection must know of a format: its spectra, its size and cost at given ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from .. import decompose
from ..formats.base import no_structure

Ranks = tuple[int, ...]
LayoutMaker = TypeVar("LayoutMaker", bound=Callable[..., "RankLayout"])


class Pixels(NamedTuple):
    """Positions of one sample that a layer reads and writes: H·W and H'·W' of a convolution, 1 and 1 else."""

    input: int = 1
    output: int = 1


class Spectrum(NamedTuple):
    """Singular values, float64 descending, of an unfolding of the given shape."""

    values: Tensor
    shape: tuple[int, int]


class RankLayout(ABC):
    """The ranks of one weight in one format, in the order in which the format takes them."""

    format: ClassVar[str]
    names: tuple[str, ...]
    int_is_bound: ClassVar[bool] = False
    """Whether a single int is the largest that each rank may be, so that smaller limits need no warning."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shape = tuple(weight.shape)
        self.numel = math.prod(self.shape)

    @property
    @abstractmethod
    def limits(self) -> Ranks:
        """Largest value of each rank."""

    @abstractmethod
    def spectra(self) -> list[Spectrum]:
        """The spectrum that decides each rank."""

    @abstractmethod
    def params(self, ranks: Ranks) -> int:
        """Stored weights at these ranks, without the bias."""

    @abstractmethod
    def macs(self, ranks: Ranks, pixels: Pixels) -> int:
        """Multiply-adds of one sample at these ranks."""

    @abstractmethod
    def scaled(self, fraction: float) -> Ranks:
        """Ranks at a fraction in [0, 1] of the limits, at least 1; monotone in the fraction."""

    def useful(self, ranks: Ranks, place: int) -> bool:
        """Whether the rank at `place` is not beyond what the others let it add."""
        return True

    def inner(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Ranks as a user wrote them without what they imply, such as the boundary ones of a train."""
        return tuple(ranks)

    def pack(self, ranks: Ranks) -> int | Ranks:
        """Ranks as the format takes them: a bare int where there is one only."""
        return ranks[0] if len(ranks) == 1 else ranks


_LAYOUTS: dict[str, Callable[..., RankLayout]] = {}


def register_layout(layout: type[RankLayout]) -> type[RankLayout]:
    _LAYOUTS[layout.format] = layout
    return layout


def register_layout_maker(*formats: str) -> Callable[[LayoutMaker], LayoutMaker]:
    """Decorator of a function that says whose ranks those of these formats are."""

    def register(maker: LayoutMaker) -> LayoutMaker:
        _LAYOUTS.update(dict.fromkeys(formats, maker))
        return maker

    return register


def rank_layout(weight: Tensor, format: str, **options: Any) -> RankLayout:
    """Layout of `weight` in the named format; `options` as its `from_dense` takes them (in_modes, out_modes).

    Raises ValueError that lists the formats ranks can be chosen for, or for modes that do not fit;
    TypeError for an option that the format does not have.
    """
    if format not in _LAYOUTS:
        known = ", ".join(sorted(_LAYOUTS))
        raise ValueError(f"no rank selection for format {format!r}; known formats: {known}")
    return _LAYOUTS[format](weight, **options)


@register_layout
class SVDLayout(RankLayout):
    """W [M, N] = a [M, R] @ b [R, N]: R(M + N) weights and as many multiply-adds a row."""

    format = "svd"
    names = ("rank",)

    def __init__(self, weight: Tensor, **options: Any) -> None:
        no_structure("svd", options)
        if weight.ndim != 2:
            raise ValueError(f"svd: weight must be [M, N], got shape {list(weight.shape)}")
        super().__init__(weight)

    @property
    def limits(self) -> Ranks:
        return (min(self.shape),)

    def spectra(self) -> list[Spectrum]:
        rows, columns = self.shape
        return [Spectrum(decompose.singular_values(self.weight), (rows, columns))]

    def params(self, ranks: Ranks) -> int:
        return ranks[0] * sum(self.shape)

    def macs(self, ranks: Ranks, pixels: Pixels) -> int:
        out_features, in_features = self.shape
        return ranks[0] * (in_features * pixels.input + out_features * pixels.output)

    def scaled(self, fraction: float) -> Ranks:
        return (max(1, math.floor(fraction * self.limits[0])),)


@register_layout
class Tucker2Layout(RankLayout):
    """W [T, S, *k] with ranks (R_out, R_in): S·R_in + |k|·R_in·R_out + R_out·T weights."""

    format = "tucker2"
    names = ("rank_out", "rank_in")

    def __init__(self, weight: Tensor, *, method: str = "hooi", **options: Any) -> None:
        no_structure("tucker2", options)
        if not 3 <= weight.ndim <= 5:
            raise ValueError(
                f"tucker2: weight must be [T, S, *k] with 1 to 3 spatial dimensions, got {list(weight.shape)}"
            )
        super().__init__(weight)
        self.taps = math.prod(self.shape[2:])

    @property
    def limits(self) -> Ranks:
        return self.shape[:2]

    def spectra(self) -> list[Spectrum]:
        return [
            Spectrum(decompose.singular_values(self.weight, mode), (size, self.numel // size))
            for mode, size in enumerate(self.limits)
        ]

    def params(self, ranks: Ranks) -> int:
        rank_out, rank_in = ranks
        return self.shape[1] * rank_in + self.taps * rank_in * rank_out + rank_out * self.shape[0]

    def macs(self, ranks: Ranks, pixels: Pixels) -> int:
        rank_out, rank_in = ranks
        last = rank_out * (self.taps * rank_in + self.shape[0])
        return pixels.input * self.shape[1] * rank_in + pixels.output * last

    def scaled(self, fraction: float) -> Ranks:
        rank_out, rank_in = (max(1, round(fraction * size)) for size in self.limits)
        # A core unfolding has no more rank than columns: beyond that a rank costs and adds nothing.
        return min(rank_out, rank_in * self.taps), min(rank_in, rank_out * self.taps)

    def useful(self, ranks: Ranks, place: int) -> bool:
        return ranks[place] <= ranks[1 - place] * self.taps
