"""Whether the package's own kernels compute on a device what the library computes there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .._native import TRIED_DEVICES
from .base import get_plan

__all__ = ["TRIED_DEVICES", "disagreements"]

_LIBRARY = ("staged", "merged", "dense")
"""Plans of the library's kernels: those that round most like the package's own first."""

_LIMITS = {torch.float16: 5e-2, torch.bfloat16: 5e-2, torch.float32: 1e-2}
"""Relative L2 difference by dtype that roundings explain, those of TF32 among them."""


def disagreements(calls: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """The plans of own kernels whose results differ from the library's, and by how much.

    Args:
        calls: plan name to a call that returns the output, or a tuple of gradients. Results are compared with
            those of the first of "staged", "merged" and "dense" among them; without any, no plan of own
            kernels agrees.
    """
    own = [name for name in calls if get_plan(name).own_kernels]
    if not own:
        return {}
    library = next((name for name in _LIBRARY if name in calls), None)
    if library is None:
        return dict.fromkeys(own, "no plan of the library serves here to compare its results with")
    expected = _tensors(calls[library]())
    found = {}
    for name in own:
        worst = max(
            (_difference(a, b) for a, b in zip(_tensors(calls[name]()), expected, strict=True)), default=0.0
        )
        if worst > 1.0:
            found[name] = f"its results differ from the library's by {worst:.1f} times what roundings explain"
    return found


def _tensors(results: object) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)  # type: ignore[arg-type]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative difference over what the dtype allows; infinite where only one of the two is finite."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    wide = expected.double()
    norm = wide.norm()
    if not bool(torch.isfinite(norm)):
        return 0.0  # the library overflows here: nothing to compare with
    relative = (found.double() - wide).norm() / norm.clamp_min(torch.finfo(found.dtype).tiny)
    if not bool(torch.isfinite(relative)):
        return float("inf")
    return float(relative) / _LIMITS.get(found.dtype, 1e-6)
