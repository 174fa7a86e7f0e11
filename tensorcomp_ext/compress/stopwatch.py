"""Times that latency rules choose by: of candidates for a layer and of whole networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tensorcomp_ext.compress.calls import Call
from tensorcomp_ext.compress.latency import Latency, measure_network, percentile
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.plan import tune
from tensorcomp_ext.plan.clock import clock_for
from tensorcomp_ext.plan.modes import evaluating

FAST = 0.1
"""The percentile that counts: what a call takes when nothing else runs."""
_LEAST_ROUNDS = 5
_MOST_ROUNDS = 200


class Stopwatch(Protocol):
    """Measures; tests put a table in its place."""

    def layers(
        self, dense: nn.Module, call: Call, made: Sequence[FactorizedLayer], seconds: float
    ) -> list[float]:
        """Seconds of one call of the dense layer, then of each of the others; tunes the others for it."""
        ...

    def networks(
        self, models: Mapping[str, nn.Module], example_inputs: Any, seconds: float
    ) -> dict[str, Latency]:
        """Latencies of whole networks, interleaved."""
        ...


class WallClock:
    """Measures on this machine, as it is now."""

    def layers(
        self, dense: nn.Module, call: Call, made: Sequence[FactorizedLayer], seconds: float
    ) -> list[float]:
        """Interleaved, each sample with cold caches; a quarter of the time goes to tuning."""
        with torch.random.fork_rng(devices=[]), evaluating(dense, *made), torch.inference_mode():
            x = call.input()
            x.normal_(generator=torch.Generator(x.device).manual_seed(0))
            for layer in made:
                # Every candidate has some four plans.
                tune(layer, x, min_seconds=seconds / (16 * max(1, len(made))))
            return _interleaved([dense.forward, *(layer.forward for layer in made)], x, 0.75 * seconds)

    def networks(
        self, models: Mapping[str, nn.Module], example_inputs: Any, seconds: float
    ) -> dict[str, Latency]:
        """In evaluation mode without autograd."""
        return measure_network(models, example_inputs, seconds)


def _interleaved(calls: Sequence[Callable[[Tensor], object]], x: Tensor, seconds: float) -> list[float]:
    clock = clock_for(x.device, cold=True)
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(x)
    stop = time.perf_counter() + seconds
    for turn in range(_MOST_ROUNDS):
        if turn >= _LEAST_ROUNDS and time.perf_counter() > stop:
            break
        for taken, call in zip(samples, calls, strict=True):
            taken.append(clock.sample(lambda call=call: call(x)))  # type: ignore[misc]
    return [percentile(taken, FAST) for taken in samples]
