"""The package's own ways to compute a row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..nn import FactorizedConv2d
from ..ops import tucker2_conv2d
from .candidates import Candidate
from .problem import Problem, step

LAYER, OP = "ours layer", "ours op"
"""The layer is the headline: what a user calls, weights packed for inference. The op takes plain factors."""


def layer_plan() -> str | None:
    """The plan the measured layer is held to; None, which lets it choose, where there is no native code."""
    return "fused" if _native.status().ok else None


def our_candidates(problem: Problem) -> list[Candidate]:
    """The layer and the functional op, in the given layout."""
    return [_layer(problem), _op(problem)]


def build_layer(problem: Problem, plan: str | None = "") -> FactorizedConv2d:
    """A ``FactorizedConv2d`` holding the problem's factors.

    Args:
        plan: what the layer is held to; None lets it choose, "" is :func:`layer_plan`.
    """
    case = problem.case
    # Weights born under inference mode have no version and would be packed again at every call.
    with torch.inference_mode(False):
        layer = FactorizedConv2d(
            case.S,
            case.T,
            case.kernel,
            case.stride,
            case.padding,
            case.dilation,
            bias=True,
            format="tucker2",
            rank=(case.r_out, case.r_in),
            device=problem.device,
            dtype=problem.core.dtype,
        )
        names = ("weight.core", "weight.factor_out", "weight.factor_in", "bias")
        parameters = dict(layer.named_parameters())
        with torch.no_grad():
            for name, value in zip(names, problem.weights(), strict=True):
                parameters[name].copy_(value)
    layer.plan = layer_plan() if plan == "" else plan
    layer.train(problem.training)
    layer.requires_grad_(problem.training)
    return layer


def _layer(problem: Problem) -> Candidate:
    return layer_candidate(LAYER, build_layer(problem), problem)


def layer_candidate(name: str, layer: FactorizedConv2d, problem: Problem) -> Candidate:
    """A layer as :func:`build_layer` makes it, called on the problem's input in the given layout."""
    x = problem.x(problem.layout)
    if not problem.training:
        return Candidate(name, "ours", problem.layout, lambda: (layer(x),))
    parameters = dict(layer.named_parameters())
    wanted = [
        x,
        *(parameters[f"weight.{n}"] for n in ("core", "factor_out", "factor_in")),
        parameters["bias"],
    ]
    call = step(lambda: layer(x), wanted, problem.grad(problem.layout))
    return Candidate(name, "ours", problem.layout, call)


def _op(problem: Problem) -> Candidate:
    case, x = problem.case, problem.x(problem.layout)
    core, factor_out, factor_in, bias = problem.weights()

    def forward() -> Tensor:
        return tucker2_conv2d(x, core, factor_out, factor_in, bias, case.stride, case.padding, case.dilation)

    if not problem.training:
        return Candidate(OP, "ours", problem.layout, lambda: (forward(),))
    wanted = [x, core, factor_out, factor_in, bias]
    return Candidate(OP, "ours", problem.layout, step(forward, wanted, problem.grad(problem.layout)))
