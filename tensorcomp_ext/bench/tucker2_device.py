"""Rows of the Tucker-2 suite on CUDA: every plan of ours against every way of the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import tucker2_conv2d
from ..plan import plans_for, tune
from .candidates import Candidate, Dense, Stages, _candidate, library_candidates
from .cases import Case
from .devices import Device
from .measure import (
    FUSED,
    OP,
    PARTIAL,
    STAGED,
    TUNED,
    as_it_runs,
    measure_candidates,
    offer,
    outcome,
    row_head,
    slack,
)
from .ours import build_layer, layer_candidate
from .problem import Problem, step
from .roofline import Probe
from .timing import Effort

LARGE = 100_000
"""Pixels (N H W) from which a row fills a large GPU; the summary's means are over these."""

_PLANS = {"fused": FUSED, "partial": PARTIAL, "staged": STAGED}
_TUNE_S = 0.02

# N, S, T, H, stride, R_in, R_out; 3x3, padding 1: at least 100,000 pixels each.
_LARGE_CASES = (
    (128, 64, 64, 56, 1, 16, 16),
    (128, 64, 64, 56, 1, 32, 32),
    (128, 64, 64, 56, 1, 64, 64),
    (128, 128, 128, 28, 1, 32, 32),
    (128, 128, 128, 28, 1, 64, 64),
    (512, 256, 256, 14, 1, 64, 64),
    (512, 256, 256, 14, 1, 96, 96),
    (2048, 512, 512, 7, 1, 128, 128),
    (128, 64, 64, 56, 1, 17, 19),
    (512, 256, 256, 14, 1, 144, 141),
    (512, 16, 16, 32, 1, 6, 6),
    (512, 32, 32, 16, 1, 12, 12),
    (2048, 64, 64, 8, 1, 16, 16),
    (1024, 16, 16, 32, 1, 8, 8),
    (1024, 32, 32, 16, 1, 16, 16),
    (128, 64, 128, 56, 2, 24, 40),
    (256, 128, 256, 28, 2, 48, 64),
    (1024, 256, 512, 14, 2, 96, 128),
)


def large_cases() -> list[Case]:
    """Convolutions of ResNets at batches that fill a large GPU."""
    return [Case(n, s, t, h, h, r, q, stride=stride) for n, s, t, h, stride, r, q in _LARGE_CASES]


def pixels(case: Case) -> int:
    return case.N * case.H * case.W


def measure_device_row(
    case: Case,
    direction: str,
    threads: int,
    *,
    device: Device,
    compiled: str,
    effort: Effort,
    probe: Probe,
) -> dict[str, Any]:
    """One row as JSON types, with everything :func:`measure.outcome` gives.

    Inference and training step both run as CUDA graphs where they can be captured. Ours: the fused and the
    partial plan with packed weights, the staged one, the op with plain factors, and what ``tune`` picks.
    """
    training = direction == "backward"
    row = row_head(case, direction, threads, device, large=pixels(case) >= LARGE)
    # Beyond the settings, under which cuDNN would measure every algorithm it has for float64 too.
    problem = Problem(case, training=training, device=device.name)
    with as_it_runs(device, case.dtype, training):
        candidates = our_ways(problem) + library_candidates(problem)
        if compiled != "never":
            candidates += compiled_ways(problem, compiled)
        row["candidates"], timed = measure_candidates(
            candidates, lambda c, outputs: problem.fault(outputs, slack(c)), device, effort
        )
        if training:
            row["memory"] = _memory(candidates, device)
    row["roofline"] = probe.roofline(case, direction, threads).to_dict()
    return row | outcome(row, timed)


def our_ways(problem: Problem) -> list[Candidate]:
    """The layer on each plan there is, the functional op, and the layer after ``tune``."""
    names = [plan.name for plan in plans_for(build_layer(problem, None))]
    found = [
        offer(
            label,
            "ours",
            problem.layout,
            lambda name=name, label=label: layer_candidate(label, build_layer(problem, name), problem),  # type: ignore[misc]
        )
        for name, label in _PLANS.items()
        if name in names
    ]
    found.append(_op(problem))
    found.append(offer(TUNED, "ours", problem.layout, lambda: _tuned(problem)))
    return found


def _tuned(problem: Problem) -> Candidate:
    layer = build_layer(problem, None)
    # Inputs born under inference mode could not be asked for gradients.
    with torch.inference_mode(False):
        example = problem.x(problem.layout).detach().clone()
        options = {"training": problem.training, "cuda_graphs": problem.device == "cuda"}
        result = tune(layer, example, min_seconds=_TUNE_S, **options)  # type: ignore[arg-type]
    candidate = layer_candidate(TUNED, layer, problem)
    candidate.note = result.layers[0].choice if result.layers else None
    return candidate


def _op(problem: Problem) -> Candidate:
    case, x = problem.case, problem.x(problem.layout)
    core, factor_out, factor_in, bias = problem.weights()

    def forward() -> Tensor:
        return tucker2_conv2d(x, core, factor_out, factor_in, bias, case.stride, case.padding, case.dilation)

    if not problem.training:
        return Candidate(OP, "ours", problem.layout, lambda: (forward(),))
    wanted = [x, core, factor_out, factor_in, bias]
    return Candidate(OP, "ours", problem.layout, step(forward, wanted, problem.grad(problem.layout)))


def compiled_ways(problem: Problem, compiled: str) -> list[Candidate]:
    """Stages and dense convolution through ``torch.compile``, in channels-last (and with "always" in the
    given layout)."""
    layouts = ["nhwc"] if compiled == "best" or problem.layout == "nhwc" else ["nhwc", problem.layout]
    found = []
    for layout in layouts:
        stages, dense = Stages(problem, layout), Dense(problem, layout)
        found.append(_candidate("stages compiled", "stages", stages, problem, layout, frozen=False))
        found.append(_candidate("dense compiled", "dense", dense, problem, layout, frozen=False))
    return found


def _memory(candidates: list[Candidate], device: Device) -> dict[str, Any] | None:
    """Peak bytes of a training step beyond inputs and weights: the fused plan and the eager stages in
    channels-last."""
    peaks = {}
    for key, name in (("ours_bytes", FUSED), ("stages_bytes", "stages eager nhwc")):
        for candidate in candidates:
            if candidate.name == name:
                try:
                    peaks[key] = device.peak_bytes(candidate.call)
                except (RuntimeError, ValueError):
                    return None  # the candidate's own record says why
    if len(peaks) < 2 or not peaks["stages_bytes"]:
        return None
    return peaks | {"ratio": peaks["ours_bytes"] / peaks["stages_bytes"]}
