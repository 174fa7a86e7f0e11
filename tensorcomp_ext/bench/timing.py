"""Interleaved timing: every round times each candidate once, so that drift of the machine meets all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Call = Callable[[], object]

SAMPLE_S = 400e-6
"""A sample repeats a short call until it lasts this long: the clock and the loop then weigh under a
thousandth."""


LEAST_ROUNDS = 5
SLOW_S, SLOW_TIMES = 20e-3, 10.0
"""A candidate slower than both, in seconds and in times of the fastest, is only measured so often."""


@dataclass(frozen=True)
class Timing:
    """Summary of one candidate's samples, microseconds a call."""

    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    samples: int
    inner: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds follow from ``budget_s`` and stay between the two bounds.

    A candidate that takes long and far longer than the fastest sits out after the first rounds, so that the
    others get the more.
    """

    budget_s: float = 2.0
    min_rounds: int = 15
    max_rounds: int = 101
    warmup_s: float = 0.03
    limit_s: float = 60.0
    """Seconds that samples may take in all: rounds become fewer for it, down to ``LEAST_ROUNDS``."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sample_s": SAMPLE_S}


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics; ``share`` in [0, 1]."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(samples_us: Sequence[float], inner: int) -> Timing:
    """Median, 10th and 90th percentile and least of samples in microseconds."""
    return Timing(
        median_us=percentile(samples_us, 0.5),
        p10_us=percentile(samples_us, 0.1),
        p90_us=percentile(samples_us, 0.9),
        min_us=min(samples_us),
        samples=len(samples_us),
        inner=inner,
    )


def _warm_up(call: Call, seconds: float) -> float:
    """Call for ``seconds``, three times at least where that takes no longer than a second; the fastest call
    in seconds."""
    fastest = math.inf
    begin = time.perf_counter()
    calls = 0
    while (calls < 3 and time.perf_counter() - begin < 1.0) or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
        calls += 1
    return fastest


def _rounds(effort: Effort, round_s: float, later_s: float) -> int:
    """How many rounds, where the first few take ``round_s`` each and all further ones ``later_s``."""
    wanted = min(effort.max_rounds, max(effort.min_rounds, int(effort.budget_s / later_s)))
    left = effort.limit_s - LEAST_ROUNDS * round_s
    allowed = LEAST_ROUNDS + max(0, int(left / later_s))
    return min(wanted, allowed)


def interleave(calls: Mapping[str, Call], effort: Effort) -> dict[str, Timing]:
    """Time each call, A B C A B C …, and summarise.

    Every sample of a call that is no long one begins with one untimed call, so that no candidate pays for the
    caches its predecessor left.
    Which candidate opens a round moves on by one each round. The garbage collector rests meanwhile.
    """
    fastest = {name: _warm_up(call, effort.warmup_s) for name, call in calls.items()}
    inner = {name: max(1, math.ceil(SAMPLE_S / seconds)) for name, seconds in fastest.items()}
    cost = {name: s * (inner[name] + (s < SLOW_S)) for name, s in fastest.items()}
    slow = {n for n, s in fastest.items() if s > max(SLOW_S, SLOW_TIMES * min(fastest.values()))}
    rounds = _rounds(effort, sum(cost.values()), sum(cost[name] for name in calls if name not in slow))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn == LEAST_ROUNDS and slow:
                names = [name for name in names if name not in slow]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                call, repeats = calls[name], range(inner[name])
                if fastest[name] < SLOW_S:
                    call()
                start = time.perf_counter_ns()
                for _ in repeats:
                    call()
                samples[name].append((time.perf_counter_ns() - start) / inner[name] / 1e3)
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(samples[name], inner[name]) for name in calls}
