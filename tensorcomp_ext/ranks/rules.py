"""Rules that choose the ranks of a weight: EVBMF, energy, and budgets of parameters or operations."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from .evbmf import evbmf
from .layouts import Pixels, RankLayout, Ranks, Spectrum, rank_layout

_RULES: dict[str, type[RankRule]] = {}


def register_rule(rule: type[RankRule]) -> type[RankRule]:
    _RULES[rule.name] = rule
    return rule


def rule_class(name: str) -> type[RankRule]:
    """Rule of that name; ValueError lists the known ones."""
    if not isinstance(name, str) or name not in _RULES:
        raise ValueError(f"unknown rank rule {name!r}; known rules: {', '.join(sorted(_RULES))}")
    return _RULES[name]


class RankRule(ABC):
    """A way to choose ranks from a weight. Rules are immutable, comparable and JSON-able."""

    name: ClassVar[str]

    @abstractmethod
    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        """Ranks, each within 1 and its limit."""

    def resolve(
        self, weight: Tensor, format: str, *, pixels: tuple[int, int] = (1, 1), **options: Any
    ) -> int | Ranks:
        """Ranks of `weight` in the named format, as it takes them: (R_out, R_in) for "tucker2", R for "svd".

        `pixels` are the positions (H·W, H'·W') that the layer reads and writes for one sample; only rules
        that count operations look at them. `options` are those of the format (in_modes, out_modes). Raises
        ValueError for NaN or Inf in the weight, a weight of the wrong number of dimensions or an unknown
        format.
        """
        layout = rank_layout(weight, format, **options)
        return layout.pack(self.choose(layout, _check_pixels(pixels)))

    def to_config(self) -> dict[str, Any]:
        """JSON-able description: {"rule": name, ...arguments}."""
        return {"rule": self.name, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> RankRule:
        """Inverse of `to_config`; ValueError for an unknown rule or argument."""
        arguments = dict(config)
        if "rule" not in arguments:
            raise ValueError(f"a rank rule needs the key 'rule', got {sorted(arguments)}")
        rule = rule_class(arguments.pop("rule"))
        try:
            return rule(**arguments)
        except TypeError as error:
            raise ValueError(f"rank rule {rule.name!r}: {error}") from error

    @classmethod
    def parse(cls, argument: str) -> RankRule:
        """Rule from the text behind the colon of "name:argument"; ValueError when it does not fit."""
        if argument:
            raise ValueError(f"takes no argument, got {argument!r}")
        return cls()


def _check_pixels(pixels: tuple[int, int]) -> Pixels:
    if len(pixels) != 2 or min(pixels) < 1:
        raise ValueError(f"pixels must be (input, output) positions of at least 1, got {tuple(pixels)}")
    return Pixels(*pixels)


def _check_number(rule: str, name: str, value: object, *, fraction: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{rule}: {name} must be a number, got {type(value).__name__}")
    if fraction and not 0.0 < value <= 1.0:
        raise ValueError(f"{rule}: {name} must be in (0, 1], got {value}")
    if not fraction and not 1 <= value < math.inf:
        raise ValueError(f"{rule}: {name} must be at least 1 and finite, got {value}")


@register_rule
@dataclass(frozen=True)
class VBMF(RankRule):
    """EVBMF rank of each unfolding, at least 1 (Kim et al., 2016, for Tucker-2). See `evbmf`."""

    name: ClassVar[str] = "vbmf"
    exact_threshold: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.exact_threshold, bool):
            raise TypeError(f"VBMF: exact_threshold must be a bool, got {self.exact_threshold!r}")

    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        return tuple(max(1, self._rank(spectrum)) for spectrum in layout.spectra())

    def _rank(self, spectrum: Spectrum) -> int:
        values, shape = spectrum
        return evbmf(spectrum=values, shape=shape, exact_threshold=self.exact_threshold).rank

    def __str__(self) -> str:
        return "vbmf:exact" if self.exact_threshold else "vbmf"

    @classmethod
    def parse(cls, argument: str) -> VBMF:
        if argument not in ("", "exact"):
            raise ValueError(f"takes no argument or 'exact', got {argument!r}")
        return cls(exact_threshold=argument == "exact")


@register_rule
@dataclass(frozen=True)
class Energy(RankRule):
    """Smallest rank of each unfolding that keeps a share p of its energy Σσ².

    With HOSVD the relative error of Tucker-2 is at most √(2(1 − p)): 0.316 for p = 0.95.
    """

    name: ClassVar[str] = "energy"
    p: float = 0.95

    def __post_init__(self) -> None:
        _check_number("Energy", "p", self.p, fraction=True)

    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        return tuple(self._rank(spectrum.values) for spectrum in layout.spectra())

    def _rank(self, values: Tensor) -> int:
        if values[0] == 0.0:
            return 1
        kept = (values / values[0]).square().cumsum(0)
        # Rounding in the sum must not add ranks at p = 1: values under 1e-8 of the largest carry no energy.
        enough = self.p * kept[-1] * (1 - 1e-15)
        return min(1 + int((kept < enough).sum()), values.numel())

    def __str__(self) -> str:
        return f"energy:{self.p!r}"

    @classmethod
    def parse(cls, argument: str) -> Energy:
        return cls(float(argument)) if argument else cls()


def _largest_within(layout: RankLayout, cost: Callable[[Ranks], float], budget: float, label: str) -> Ranks:
    """Ranks at the largest common fraction of the limits whose cost fits.

    Rank 1, with a warning, if even that does not.
    """
    floor, top = layout.scaled(0.0), layout.scaled(1.0)
    if cost(floor) > budget:
        warnings.warn(
            f"{label} cannot be met for {layout.format} of shape {list(layout.shape)}: rank 1 already needs "
            f"{cost(floor):.0f} of {budget:.0f}; using rank 1",
            UserWarning,
            stacklevel=5,
        )
        return floor
    if cost(top) <= budget:
        return top
    low, high, best = 0.0, 1.0, floor
    while high - low > 1e-12:
        middle = (low + high) / 2
        ranks = layout.scaled(middle)
        if cost(ranks) <= budget:
            low, best = middle, ranks
        else:
            high = middle
    return best


class _Budget(RankRule):
    """A rule with one number; "name:number" as text."""

    @classmethod
    def parse(cls, argument: str) -> RankRule:
        if not argument:
            raise ValueError("needs a number")
        number = float(argument)
        whole = number.is_integer() and cls is not Ratio
        return cls(int(number) if whole else number)  # type: ignore[call-arg]


@register_rule
@dataclass(frozen=True)
class Ratio(_Budget):
    """At most a fraction of the dense layer's weights (bias not counted): uniform ranks by bisection.

    Tucker-2 ranks are the same fraction κ of their mode sizes, R_n = max(1, round(κ I_n)); κ is bisected.
    """

    name: ClassVar[str] = "ratio"
    fraction: float

    def __post_init__(self) -> None:
        _check_number("Ratio", "fraction", self.fraction, fraction=True)

    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        return _largest_within(layout, layout.params, self.fraction * layout.numel, str(self))

    def __str__(self) -> str:
        return f"ratio:{self.fraction!r}"


@register_rule
@dataclass(frozen=True)
class Params(_Budget):
    """At most `count` stored weights for the layer (bias not counted), ranks as in `Ratio`."""

    name: ClassVar[str] = "params"
    count: float

    def __post_init__(self) -> None:
        _check_number("Params", "count", self.count, fraction=False)

    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        return _largest_within(layout, layout.params, self.count, str(self))

    def __str__(self) -> str:
        return f"params:{self.count!r}"


@register_rule
@dataclass(frozen=True)
class Flops(_Budget):
    """At most `count` FLOPs (two per multiply-add) for the layer and one sample, ranks as in `Ratio`.

    Counted over the `pixels` given to `resolve`. Without them a layer is taken to read and write one
    position, so `count` then is FLOPs per output pixel of a stride-1 convolution, or per row of a linear
    layer.
    """

    name: ClassVar[str] = "flops"
    count: float

    def __post_init__(self) -> None:
        _check_number("Flops", "count", self.count, fraction=False)

    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        return _largest_within(layout, lambda ranks: 2 * layout.macs(ranks, pixels), self.count, str(self))

    def __str__(self) -> str:
        return f"flops:{self.count!r}"
