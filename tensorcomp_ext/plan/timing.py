"""Times several calls against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from .clock import Clock, clock_for
from .tuning import Timing

_MIN_ROUNDS = 5
_HOPELESS = 5.0
_ROUND = 5e-5
"""Seconds that a round is taken to last at least."""


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time several calls turn by turn (A B C A B C), so that a change of the machine's state hits all alike.

    A call more than five times slower than the fastest after the warm-up gets few rounds. On CUDA the calls
    are timed by events on the current stream. Each sample begins with cold second-level caches.

    Args:
        seconds: time to spend on each.
        device: the device the calls work on.
        clock: what takes the seconds; None: the clock of ``device``.
    """
    taker = clock_for(device, cold=True) if clock is None else clock
    first = {}
    for name, call in calls.items():
        taker.sample(call)
        first[name] = min(taker.sample(call), taker.sample(call))
    best = min(first.values(), default=0.0)
    repeats = {name: max(1, round(taker.shortest / max(spent, 1e-7))) for name, spent in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds = max(_MIN_ROUNDS, min(200, int(seconds / max(best, _ROUND))))
    end = time.perf_counter() + seconds * len(calls)
    for turn in range(rounds):
        if turn >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if turn < 3 or first[name] <= _HOPELESS * best:
                samples[name].append(taker.sample(call, repeats[name]))
    return {name: _timing(taken) for name, taken in samples.items()}


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        ordered[len(ordered) // 2], ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
    )
