"""How the gate of a dense branch falls over training, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_fade(step: float, steps: float) -> float:
    """``(1 + cos(pi t)) / 2`` with ``t = min(1, step / steps)``: slowly at both ends."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))


def linear_fade(step: float, steps: float) -> float:
    """``1 - t`` with ``t = min(1, step / steps)``."""
    return 1.0 - min(1.0, step / steps)


def sine_fade(step: float, steps: float) -> float:
    """``1 - sin(pi t / 2)`` with ``t = min(1, step / steps)``: steeply at first."""
    return 1.0 - math.sin(0.5 * math.pi * min(1.0, step / steps))


FADES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine_fade,
    "linear": linear_fade,
    "sine": sine_fade,
}
