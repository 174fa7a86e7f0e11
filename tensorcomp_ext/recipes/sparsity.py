"""How the share of pruned weights grows over training, as pure functions of time."""

from __future__ import annotations

from collections.abc import Callable


def slow_start(t: float, n: float, final: float) -> float:
    """``s_t = s_f (t / n)^3``: slowly at first, steeply at the end; s_f from n on (Hawkins et al. 2021).

    Args:
        t: time, from 0; epochs in training.
        n: when the final sparsity is reached.
        final: s_f, in [0, 1].

    Raises:
        ValueError: a time below 0, an n of 0 or below, a sparsity outside [0, 1].

    >>> round(slow_start(25, 50, 0.9), 4)
    0.1125
    """
    _check("slow_start", t, n, final=final)
    return final * min(1.0, t / n) ** 3


def zhu_gupta(
    t: float, n: float, final: float, *, initial: float = 0.0, begin: float = 0.0, every: float = 1.0
) -> float:
    """``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n D))^3``: steeply at first (Zhu and Gupta 2017).

    Args:
        t: time, from 0; epochs in training.
        n: prunings until the final sparsity is reached.
        final, initial: s_f and s_i, in [0, 1].
        begin: t_0; before it the sparsity is the initial one.
        every: D, time between two prunings.

    Raises:
        ValueError: times below 0, an n or every of 0 or below, a sparsity outside [0, 1].

    >>> round(zhu_gupta(25, 50, 0.9), 4)
    0.7875
    """
    _check("zhu_gupta", t, n * every, final=final, initial=initial)
    done = min(1.0, max(0.0, t - begin) / (n * every))
    return final + (initial - final) * (1.0 - done) ** 3


SPARSITY_SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "slow-start": slow_start,
    "zhu-gupta": zhu_gupta,
}


def _check(name: str, t: float, n: float, **sparsities: float) -> None:
    if not t >= 0:
        raise ValueError(f"{name}: t must be at least 0, got {t}")
    if not n > 0:
        raise ValueError(f"{name}: n must be above 0, got {n}")
    for argument, value in sparsities.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: {argument} must be in [0, 1], got {value}")
