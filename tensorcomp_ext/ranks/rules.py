"""Rules that choose the ranks of a weight: EVBMF, energy, and budgets of parameters or operations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from .budgets import largest_within
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


def check_number(rule: str, name: str, value: object, *, fraction: bool, least: float = 1) -> None:
    """A number in (0, 1], or at least 1; above 0 where `least` is 0. TypeError, ValueError name the rule."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{rule}: {name} must be a number, got {type(value).__name__}")
    if fraction and not 0.0 < value <= 1.0:
        raise ValueError(f"{rule}: {name} must be in (0, 1], got {value}")
    if not fraction and not (least <= value < math.inf and value > 0):
        bound = f"at least {least}" if least else "above 0"
        raise ValueError(f"{rule}: {name} must be {bound} and finite, got {value}")


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
        check_number("Energy", "p", self.p, fraction=True)

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


class NumberRule(RankRule):
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
class Ratio(NumberRule):
    """At most a fraction of the dense layer's weights (bias not counted): largest uniform ranks, filled up.

    Tucker-2 and Tucker ranks begin as the same fraction κ of their mode sizes, R_n = max(1, round(κ I_n)), κ
    found by bisection, those of trains and rings as one number; what that leaves of the budget goes to single
    ranks, the relatively smallest first, until none can grow by 1.
    """

    name: ClassVar[str] = "ratio"
    fraction: float

    def __post_init__(self) -> None:
        check_number("Ratio", "fraction", self.fraction, fraction=True)

    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        return largest_within(layout, layout.params, self.fraction * layout.numel, str(self))

    def __str__(self) -> str:
        return f"ratio:{self.fraction!r}"


@register_rule
@dataclass(frozen=True)
class Params(NumberRule):
    """At most `count` stored weights for the layer (bias not counted), ranks as in `Ratio`."""

    name: ClassVar[str] = "params"
    count: float

    def __post_init__(self) -> None:
        check_number("Params", "count", self.count, fraction=False)

    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        return largest_within(layout, layout.params, self.count, str(self))

    def __str__(self) -> str:
        return f"params:{self.count!r}"


@register_rule
@dataclass(frozen=True)
class Flops(NumberRule):
    """At most `count` FLOPs (two per multiply-add) for the layer and one sample, ranks as in `Ratio`.

    Counted over the `pixels` given to `resolve`. Without them a layer is taken to read and write one
    position, so `count` then is FLOPs per output pixel of a stride-1 convolution, or per row of a linear
    layer.
    """

    name: ClassVar[str] = "flops"
    count: float

    def __post_init__(self) -> None:
        check_number("Flops", "count", self.count, fraction=False)

    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        return largest_within(layout, lambda ranks: 2 * layout.macs(ranks, pixels), self.count, str(self))

    def __str__(self) -> str:
        return f"flops:{self.count!r}"
