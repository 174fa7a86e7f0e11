"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(step: int, steps: int) -> float:
    """(1 + cos(pi step / steps)) / 2: from 1 down to 0 (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def onecycle(step: int, steps: int) -> float:
    """From 1/25 up to 1 over the first 30 % of the steps, then down to 0, along half cosines (Smith 2018)."""
    rise = round(0.3 * steps)
    if step < rise:
        return 1 / 25 + (1 - 1 / 25) * (1 - cosine(step, rise))
    return cosine(step - rise, max(1, steps - rise))


def decay(step: int, steps: int) -> float:
    """0.7 to the power of the tenths of the steps that are over: x0.7 every 5 of 50 epochs."""
    return float(0.7 ** (10 * step // max(1, steps)))


def multistep(step: int, steps: int) -> float:
    """1, from half of the steps on 0.1, from three quarters on 0.01 (He et al. 2016)."""
    return 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))


def constant(step: int, steps: int) -> float:
    """Always 1."""
    return 1.0


SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "cosine": cosine,
    "onecycle": onecycle,
    "constant": constant,
    "decay": decay,
    "multistep": multistep,
}


def warmed_up(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The schedule's factor at a step; over the first ``warmup`` steps times a factor that grows to 1."""
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rising * SCHEDULES[schedule](step, steps)
