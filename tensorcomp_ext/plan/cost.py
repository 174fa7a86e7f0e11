"""Predicted seconds of a plan: the sum over its passes of the slower of arithmetic and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .rates import rates

if TYPE_CHECKING:
    from .base import Plan
    from .case import Case
    from .layer import PlannedLayer


def predict(plan: Plan, layer: PlannedLayer, case: Case) -> float:
    """Seconds of one call: the sum over passes of ``overhead + max(MACs / rate, bytes / bandwidth)``.

    Training counts forward and backward. What fusion saves is bytes and launches: in true float32 a GPU is
    bound by arithmetic at most ranks, and the rates measured for it leave fused plans little advantage there.
    """
    place = layer.weight.factors[0].device
    # Of several CUDA devices, the one the layer lies on.
    device = str(place) if place.type == case.device == "cuda" else case.device
    machine = rates(case.torch_dtype, device, case.threads)
    size = torch.empty((), dtype=case.torch_dtype).element_size()
    factor = plan.backward_factor() if case.training else 1.0
    total = 0.0
    for stage in plan.stages(layer, case):
        arithmetic = stage.macs / machine.speed(stage.kind, stage.width)
        memory = stage.elements * size / machine.bandwidth
        total += machine.overhead + factor * max(arithmetic, memory)
    return total
