"""The suite of linear layers whose weight is a chain or network of cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn import FactorizedLinear
from .candidates import Candidate
from .chain_cases import LAYOUT, ChainCase
from .chain_library import library_ways
from .chain_problem import ChainProblem
from .devices import Device
from .layers import default_way, tuned_way
from .measure import measure_ways, row_head
from .roofline import Probe
from .timing import Effort


def build_chain(problem: ChainProblem) -> FactorizedLinear:
    """A ``FactorizedLinear`` of the case's format holding the problem's cores; it chooses its plan."""
    case = problem.case
    modes: dict[str, Any] = {"in_modes": case.in_modes, "out_modes": case.out_modes}
    rank: Any = case.cores.ranks[0] if len(case.cores.ranks) == 1 else case.cores.ranks
    # Weights born under inference mode have no version and would be prepared again at every call.
    with torch.inference_mode(False), torch.no_grad():
        layer = FactorizedLinear(
            case.c_in,
            case.c_out,
            device=torch.device(problem.device),
            dtype=problem.bias.dtype,
            format=case.format,
            rank=rank,
            **modes,
        )
        for parameter, value in zip(_parameters(layer), problem.weights(), strict=True):
            parameter.copy_(value)
    layer.train(problem.training)
    layer.requires_grad_(problem.training)
    return layer


def _parameters(layer: FactorizedLinear) -> list[Tensor]:
    bias = layer.bias
    assert bias is not None
    return [*layer.weight.factors, bias]


def our_ways(problem: ChainProblem) -> list[Candidate]:
    """The layer as it comes, and after ``tune``."""

    def call(layer: FactorizedLinear) -> Any:
        return problem.call(layer, _parameters(layer))

    example = problem.x_values.clone()
    return [
        default_way(LAYOUT, lambda: build_chain(problem), call, example),
        tuned_way(LAYOUT, lambda: build_chain(problem), call, example),
    ]


def measure_chain(
    case: ChainCase,
    direction: str,
    threads: int,
    *,
    device: Device,
    compiled: str,
    effort: Effort,
    probe: Probe,
) -> dict[str, Any]:
    """One row as JSON types, with everything :func:`measure.outcome` gives."""
    problem = ChainProblem(case, training=direction == "backward", device=device.name)
    return measure_ways(
        problem,
        lambda: our_ways(problem) + library_ways(problem, compiled),
        row_head(case, direction, threads, device, large=True),
        device=device,
        effort=effort,
        probe=probe,
    )
