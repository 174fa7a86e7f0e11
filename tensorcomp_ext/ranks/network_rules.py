"""Rules that choose the ranks of a whole network at once: one budget for all layers, or a latency."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .layouts import Pixels, RankLayout, Ranks
from .rules import NumberRule, RankRule, check_number, register_rule


class NetworkRule(RankRule):
    """A rule that weighs layers against each other: for ``compress`` only, not for a single weight."""

    needs_inputs: ClassVar[bool] = False
    """Whether ``compress`` must have example inputs for it."""

    def choose(self, layout: RankLayout, pixels: Pixels) -> Ranks:
        raise ValueError(
            f"{self} chooses the ranks of all layers together: pass it to tensorcomp_ext.compress(model, "
            "rank=...) itself, not for one layer"
        )


def _check_budget(rule: str, name: str, value: object) -> None:
    check_number(rule, name, value, fraction=False, least=0.0)


@register_rule
@dataclass(frozen=True)
class NetworkParams(NetworkRule, NumberRule):
    """At most so many parameters in the whole network: a share of the dense ones up to 1, a count above.

    One energy threshold shared by all layers is bisected (as `Energy`, so layers that lose little give most),
    then single ranks are grown; layers that would not get smaller stay dense. All parameters count, those of
    dense layers, biases and normalisations too. See `share_energy`.
    """

    name: ClassVar[str] = "network-params"
    budget: float

    def __post_init__(self) -> None:
        _check_budget("NetworkParams", "budget", self.budget)

    def __str__(self) -> str:
        return f"network-params:{self.budget!r}"


@register_rule
@dataclass(frozen=True)
class NetworkFlops(NetworkRule, NumberRule):
    """At most so many FLOPs for the example inputs: a share of the dense ones up to 1, a count above.

    Two FLOPs per multiply-add of the convolutions and linear layers that the example inputs reach, counted
    for the chain of factors, whatever plan runs. Chosen as in `NetworkParams`.
    """

    name: ClassVar[str] = "network-flops"
    needs_inputs: ClassVar[bool] = True
    budget: float

    def __post_init__(self) -> None:
        _check_budget("NetworkFlops", "budget", self.budget)

    def __str__(self) -> str:
        return f"network-flops:{self.budget!r}"


@register_rule
@dataclass(frozen=True)
class Latency(NetworkRule):
    """Ranks with which the whole network is measured to be so many times faster on this machine.

    For every kind of layer the latency of candidate ranks is measured under the plans that this machine runs
    fastest, each against the dense layer; the errors of these ranks follow from the spectra of each layer.
    Of all combinations within the time that is left, the one of least Σ_layers (relative output error)² is
    taken, which may leave layers dense. The whole network is then measured, the prediction corrected by what
    was found, and the choice made again, until it is as fast as asked.

    The error of a layer is ‖W − Ŵ‖/‖W‖, or with calibration inputs ‖(W − Ŵ)x‖/‖Wx‖ over what the layer reads
    when the dense network runs on them; the factors then minimise it, too.

    Arguments:
        speedup: median latency, dense / compressed, of the network on the example inputs as they are given:
            their batch, memory format and device, and torch's threads now.
        calibration: a batch or batches of inputs of the network, each as example inputs; representative ones,
            of the training data. Not part of `to_config` and of the text form, as data are not.
        seconds: about how long to measure, of which a third goes to whole networks.
        rounds: how often the whole network may be measured and chosen again.
        tolerance: relative distance from the speed-up asked for that is near enough.

    Needs example inputs. For "tucker2" and "svd"; layers of other formats stay dense, as do embeddings.
    """

    name: ClassVar[str] = "latency"
    needs_inputs: ClassVar[bool] = True
    speedup: float = 2.0
    calibration: Any = field(default=None, compare=False, repr=False)
    seconds: float = 60.0
    rounds: int = 5
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        check_number("Latency", "speedup", self.speedup, fraction=False)
        check_number("Latency", "seconds", self.seconds, fraction=False, least=0.0)
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int):
            raise TypeError(f"Latency: rounds must be an int, got {type(self.rounds).__name__}")
        if self.rounds < 1:
            raise ValueError(f"Latency: rounds must be at least 1, got {self.rounds}")
        check_number("Latency", "tolerance", self.tolerance, fraction=True)
        if self.calibration is not None and isinstance(self.calibration, (str, bytes, float, int)):
            raise TypeError(
                "Latency: calibration must be a batch of inputs or several, got "
                f"{type(self.calibration).__name__}"
            )

    def batches(self) -> Iterable[Any]:
        """The calibration batches, none without."""
        given = self.calibration
        if given is None:
            return []
        return given if isinstance(given, Iterable) and not _one_batch(given) else [given]

    def to_config(self) -> dict[str, Any]:
        return {
            "rule": self.name,
            "speedup": self.speedup,
            "seconds": self.seconds,
            "rounds": self.rounds,
            "tolerance": self.tolerance,
        }

    def __str__(self) -> str:
        return f"latency:{self.speedup!r}"

    @classmethod
    def parse(cls, argument: str) -> RankRule:
        return cls(float(argument)) if argument else cls()


def _one_batch(given: Any) -> bool:
    """Whether this is one set of inputs: a tensor, a tuple of arguments or a dict of them."""
    return hasattr(given, "shape") or isinstance(given, (tuple, dict))


def as_budget(value: float, whole: float) -> float:
    """A share of the whole up to 1, a count above."""
    return value * whole if value <= 1 else value
