"""What a layer call costs beyond its arithmetic: a tiny input through our layer and through ``nn.Conv2d``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .cases import case_from_dict
from .ours import build_layer
from .problem import Problem
from .timing import Call, Effort, interleave

_SHAPE = {
    "N": 1,
    "S": 8,
    "H": 4,
    "k": 3,
    "padding": 1,
    "r_in": 4,
    "r_out": 4,
    "layout": "nchw",
    "dtype": "float32",
}
_CALLS = 20


def _repeat(call: Call) -> Call:
    def calls() -> None:
        for _ in range(_CALLS):
            call()

    return calls


def layer_overhead(threads: int, effort: Effort) -> list[dict[str, Any]]:
    """Microseconds a call on a 1x8x4x4 input, ours (rank 4) and ``nn.Conv2d(8, 8, 3, padding=1)``,
    interleaved.

    One row for ``no_grad`` and one for ``inference_mode``.
    """
    rows = []
    modes: dict[str, Callable[[], Any]] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for mode, context in modes.items():
            problem = Problem(case_from_dict(_SHAPE), training=False)
            layer, dense = build_layer(problem), nn.Conv2d(8, 8, 3, padding=1).eval().requires_grad_(False)
            with context():
                x = problem.x("nchw")
                timed = interleave(
                    {"ours": _repeat(lambda: layer(x)), "nn.Conv2d": _repeat(lambda: dense(x))},  # noqa: B023
                    effort,
                )
            ours, theirs = (timed[name].median_us / _CALLS for name in ("ours", "nn.Conv2d"))
            rows.append(
                {
                    "mode": mode,
                    "threads": threads,
                    "ours_us": ours,
                    "conv2d_us": theirs,
                    "difference_us": ours - theirs,
                }
            )
    finally:
        torch.set_num_threads(before)
    return rows
