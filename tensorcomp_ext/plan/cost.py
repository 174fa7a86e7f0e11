"""Predicted seconds of a plan: the sum over its passes of the slower of arithmetic and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .rates import Rates, rates

if TYPE_CHECKING:
    from .base import Plan, Stage
    from .case import Case
    from .layer import PlannedLayer


def machine_rates(layer: PlannedLayer, case: Case) -> Rates:
    """The rates of the device a layer lies on."""
    place = layer.weight.factors[0].device
    # Of several CUDA devices, the one the layer lies on.
    device = str(place) if place.type == case.device == "cuda" else case.device
    return rates(case.torch_dtype, device, case.threads)


def entry_size(case: Case) -> int:
    """Bytes of an entry."""
    return torch.empty((), dtype=case.torch_dtype).element_size()


def stage_seconds(stage: Stage, machine: Rates, size: int, factor: float) -> float:
    """Seconds of a stage with entries of ``size`` bytes; ``factor`` times the work of one forward."""
    arithmetic = stage.macs / machine.speed(stage.kind, stage.width)
    memory = machine.transfer(stage.elements * size) + stage.inner * size / machine.cache_bandwidth
    return stage.calls * machine.overhead + factor * max(arithmetic, memory)


def predict(plan: Plan, layer: PlannedLayer, case: Case) -> float:
    """Seconds of one call: the sum over passes of ``overhead + max(MACs / rate, bytes / bandwidth)``.

    Training counts forward and backward. What fusion saves is bytes and launches: in true float32 a GPU is
    bound by arithmetic at most ranks, and the rates measured for it leave fused plans little advantage there.
    """
    machine, size = machine_rates(layer, case), entry_size(case)
    factor = plan.backward_factor(layer) if case.training else 1.0
    return sum(stage_seconds(stage, machine, size, factor) for stage in plan.stages(layer, case))
