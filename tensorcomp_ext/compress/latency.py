"""Latencies measured side by side: the subjects take turns, so drift of the machine hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tensorcomp_ext.plan.examples import call_model
from tensorcomp_ext.plan.modes import evaluating


class Latency(NamedTuple):
    """Percentiles of the time of one call, in seconds."""

    p10: float
    p50: float
    p90: float

    @property
    def noisy(self) -> bool:
        """Whether other work on the machine disturbed the measurement: p90 above twice the median."""
        return self.p90 > 2 * self.p50


def faster(before: float, after: float) -> str:
    """The change of a time in words: "2.00× faster", "1.05× slower"; empty for a time of zero."""
    if not before or not after:
        return ""
    return f"{before / after:.2f}× faster" if after <= before else f"{after / before:.2f}× slower"


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linearly interpolated percentile of ``values`` (any order); ``fraction`` in [0, 1]."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below, above = math.floor(position), math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def interleave(
    runs: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    min_rounds: int = 5,
    max_rounds: int = 2000,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Latency]:
    """Time callables in turn (A B A B …) for about ``seconds`` in all, after two untimed rounds.

    ``runs`` maps a name to a callable without arguments; ``synchronize`` waits for the device, for devices
    that run behind the host. At least ``min_rounds`` rounds are timed however long they take.
    """
    wait = synchronize or (lambda: None)
    for _ in range(2):
        for run in runs.values():
            run()
    wait()
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + seconds
    for round_index in range(max_rounds):
        if round_index >= min_rounds and time.perf_counter() >= stop:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - start)
    return {
        name: Latency(percentile(taken, 0.1), percentile(taken, 0.5), percentile(taken, 0.9))
        for name, taken in times.items()
    }


def device_synchronizer(model: nn.Module) -> Callable[[], None] | None:
    """What to wait for before reading the clock: the first parameter's device, nothing on the CPU."""
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cuda":
        return None
    device = first.device
    return lambda: torch.cuda.synchronize(device)


def measure_network(
    models: Mapping[str, nn.Module], example_inputs: Any, seconds: float = 2.0
) -> dict[str, Latency]:
    """Latency of whole networks on the same input, interleaved, in evaluation mode without autograd.

    ``models`` maps a name to a network, ``example_inputs`` is a tensor, a tuple or a dict; ``seconds`` is the
    time spent on all of them together. Training modes are restored. TypeError for other example inputs.
    """
    if not models:
        return {}
    runs = {name: (lambda model=model: call_model(model, example_inputs)) for name, model in models.items()}
    synchronize = device_synchronizer(next(iter(models.values())))
    with evaluating(*models.values()), torch.inference_mode():
        return interleave(runs, seconds, synchronize=synchronize)
