"""The suite of CP and tensor-ring convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn import FactorizedConv2d
from .candidates import Candidate
from .conv_cases import ConvCase
from .conv_library import library_ways
from .conv_problem import ConvProblem
from .devices import Device
from .layers import default_way, tuned_way
from .measure import measure_ways, row_head
from .roofline import Probe
from .timing import Effort


def build_conv(problem: ConvProblem) -> FactorizedConv2d:
    """A ``FactorizedConv2d`` of the case's format holding the problem's factors; it chooses its plan."""
    case = problem.case
    # Weights born under inference mode have no version and would be packed again at every call.
    with torch.inference_mode(False), torch.no_grad():
        layer = FactorizedConv2d(
            case.S,
            case.T,
            case.window.kernel,
            case.stride,
            case.padding,
            case.dilation,
            bias=True,
            format=case.format,
            rank=case.rank,
            device=problem.device,
            dtype=problem.bias.dtype,
        )
        for parameter, value in zip(_parameters(layer), problem.weights(), strict=True):
            parameter.copy_(value)
    layer.train(problem.training)
    layer.requires_grad_(problem.training)
    return layer


def _parameters(layer: FactorizedConv2d) -> list[Tensor]:
    assert layer.bias is not None
    return [*layer.weight.factors, layer.bias]


def our_ways(problem: ConvProblem) -> list[Candidate]:
    """The layer as it comes, and after ``tune``, in the given layout."""

    def call(layer: FactorizedConv2d) -> Any:
        return problem.call(problem.layout, layer, _parameters(layer))

    with torch.inference_mode(False):
        example = problem.x(problem.layout).detach().clone()
    return [
        default_way(problem.layout, lambda: build_conv(problem), call, example),
        tuned_way(problem.layout, lambda: build_conv(problem), call, example),
    ]


def measure_conv(
    case: ConvCase,
    direction: str,
    threads: int,
    *,
    device: Device,
    compiled: str,
    effort: Effort,
    probe: Probe,
) -> dict[str, Any]:
    """One row as JSON types, with everything :func:`measure.outcome` gives."""
    problem = ConvProblem(case, training=direction == "backward", device=device.name)
    return measure_ways(
        problem,
        lambda: our_ways(problem) + library_ways(problem, compiled),
        row_head(case, direction, threads, device, large=True),
        device=device,
        effort=effort,
        probe=probe,
    )
