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
from .measure import measure_candidates, outcome, slack
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
    training = direction == "backward"
    row: dict[str, Any] = {
        "case": case.to_dict(),
        "label": case.label(),
        "direction": direction,
        "threads": threads,
        "device": device.name,
        "macs": case.macs(),
        "dense_macs": case.dense_macs(),
        "large": True,
    }
    problem = ConvProblem(case, training=training, device=device.name)
    with (
        device.settings(case.dtype or "float32"),
        torch.set_grad_enabled(training),
        torch.inference_mode(not training),
    ):
        candidates = our_ways(problem) + library_ways(problem, compiled)
        row["candidates"], timed = measure_candidates(
            candidates, lambda c, outputs: problem.fault(outputs, slack(c)), device, effort
        )
    row["roofline"] = probe.roofline(case, direction, threads).to_dict()
    return row | outcome(row, timed)
