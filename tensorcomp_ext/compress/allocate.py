"""Ranks of all layers of a network together, under rules that weigh layers against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tensorcomp_ext._warnings import warn
from tensorcomp_ext.compress.calls import Call, dense_macs
from tensorcomp_ext.compress.factorize import Choice
from tensorcomp_ext.ranks import Latency, NetworkFlops, NetworkParams, NetworkRule, rank_layout
from tensorcomp_ext.ranks.layouts import Pixels, Ranks
from tensorcomp_ext.ranks.network_rules import as_budget
from tensorcomp_ext.ranks.shared_energy import Subject, share_energy

Progress = Callable[[int, int, str], None]


class Allocation(NamedTuple):
    """The layers to replace with their ranks, why others stay dense, and what goes into the report."""

    choices: list[Choice]
    dense: dict[str, str]
    details: dict[str, Any]


def check_rule(rule: NetworkRule, choices: Sequence[Choice], reasons: Mapping[str, str], inputs: Any) -> None:
    """Refuse what leaves a rule nothing to choose from, before anything is decomposed.

    Raises:
        ValueError: no example inputs for a rule that needs them; no layer left, with the reasons.
    """
    if rule.needs_inputs and inputs is None:
        raise ValueError(f"compress: rank={rule} needs example_inputs")
    if not choices:
        said = "; ".join(f"{name or 'model'}: {reason}" for name, reason in list(reasons.items())[:8])
        raise ValueError(
            f"compress: rank={rule} is left no layer to choose ranks for "
            f"({said or 'no convolution, linear layer or embedding found'})"
        )


def allocate(
    rule: NetworkRule,
    model: nn.Module,
    choices: Sequence[Choice],
    calls: Mapping[str, list[Call]] | None,
    example_inputs: Any,
    parameters: int,
    progress: Progress | None = None,
) -> Allocation:
    """Give every choice its rank, or leave the layer dense, as the rule says.

    ``parameters`` are those of the whole network. Raises ValueError for a rule this does not know, and as
    the rules' algorithms do.
    """
    if isinstance(rule, Latency):
        from tensorcomp_ext.compress.latency_rule import allocate_latency

        return allocate_latency(rule, model, choices, calls or {}, example_inputs, progress)
    if isinstance(rule, NetworkParams):
        fixed = parameters - sum(choice.layer.weight.numel() for choice in choices)
        subjects = {
            c.name: Subject(layout := _layout(c), layout.params, c.layer.weight.numel()) for c in choices
        }
        return _shared(rule, choices, subjects, as_budget(rule.budget, parameters), fixed)
    if isinstance(rule, NetworkFlops):
        made = calls or {}
        subjects = {c.name: _flops_subject(c, made[c.name]) for c in choices}
        whole = sum(2.0 * (dense_macs(layer, call) or 0) for layer, call in _every_call(model, made))
        fixed = whole - sum(subject.dense_cost for subject in subjects.values())
        return _shared(rule, choices, subjects, as_budget(rule.budget, whole), fixed)
    raise ValueError(f"compress: no allocation for the rank rule {type(rule).__name__}")


def _layout(choice: Choice) -> Any:
    try:
        layout = rank_layout(choice.layer.weight.detach(), choice.format, **choice.structure)
        layout.spectra()
    except ValueError as error:
        raise ValueError(f"compress: layer {choice.name!r}: {error}") from error
    return layout


def positions(layer: nn.Module, call: Call) -> Pixels:
    """Positions that a call reads and writes, batch included."""
    if isinstance(layer, _ConvNd):
        return Pixels(
            math.prod(call.shape) // layer.in_channels, math.prod(call.output_shape) // layer.out_channels
        )
    rows = math.prod(call.shape[:-1])
    return Pixels(rows, rows)


def _flops_subject(choice: Choice, made: Sequence[Call]) -> Subject:
    layout = _layout(choice)
    where = [positions(choice.layer, call) for call in made]

    def cost(ranks: Ranks) -> float:
        return 2.0 * sum(layout.macs(ranks, place) for place in where)

    return Subject(layout, cost, 2.0 * sum(dense_macs(choice.layer, call) or 0 for call in made))


def _every_call(model: nn.Module, calls: Mapping[str, list[Call]]) -> list[tuple[nn.Module, Call]]:
    return [(model.get_submodule(name), call) for name, made in calls.items() for call in made]


def _shared(
    rule: NetworkRule, choices: Sequence[Choice], subjects: Mapping[str, Subject], budget: float, fixed: float
) -> Allocation:
    found = share_energy(subjects, budget - fixed)
    if found is None:
        least = fixed + sum(min(s.price(s.at(0.0)), s.dense_cost) for s in subjects.values())
        warn(
            f"compress: {rule} cannot be met: rank 1 everywhere already needs {least:.0f} of {budget:.0f}; "
            "using rank 1",
        )
        ranks, p, cost = {name: s.at(0.0) for name, s in subjects.items()}, 0.0, least - fixed
    else:
        ranks, p, cost = found
    kept, dense = [], {}
    for choice in choices:
        chosen = ranks[choice.name]
        if chosen is None:
            dense[choice.name] = f"{rule}: would cost as much in {choice.format}"
        else:
            choice.rank = subjects[choice.name].layout.pack(chosen)
            kept.append(choice)
    details = {"asked": str(rule), "budget": budget, "reached": fixed + cost, "shared_energy": p}
    return Allocation(kept, dense, {"network_rule": details})
