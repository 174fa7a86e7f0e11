"""Timing on CUDA: events round one call, a cold second-level cache before it, candidates turn by turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .timing import Call, Effort, Timing, summarise

FLUSH_BYTES = 256 << 20
"""Least size of what is written between samples; it also keeps the GPU busy while the call is enqueued."""

_HOPELESS = 10.0
_WARMUP_CALLS = 3


class Clock(Protocol):
    """Where events come from; tests bring their own."""

    def flush(self) -> None: ...

    def mark(self) -> Any: ...

    def elapsed_us(self, begin: Any, end: Any) -> float: ...

    def synchronize(self) -> None: ...


class CudaClock:
    """Events of the current stream, and a buffer of at least twice the second-level cache to push it out."""

    def __init__(self) -> None:
        size = max(FLUSH_BYTES, 2 * torch.cuda.get_device_properties().L2_cache_size)
        # Born under inference mode it could not be written in the rows of training.
        with torch.inference_mode(False):
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cuda")

    def flush(self) -> None:
        self._buffer.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) * 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()


@dataclass
class Prepared:
    """A call ready to be timed."""

    call: Callable[[], tuple[Tensor, ...]]
    how: str
    """"graph" or "eager"."""
    reason: str | None = None
    """Why the capture failed, where it did."""


def capture(call: Callable[[], tuple[Tensor, ...]]) -> Prepared:
    """The call as a CUDA graph, after warm-up on a side stream; the call itself where that fails.

    What the prepared call returns is written again by every replay.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    # torch.cuda.graph would collect garbage and empty the pool first, tenths of a second for each candidate;
    # rows do so once. Garbage found within the capture could free what a capture must not see freed.
    gc.disable()
    try:
        with torch.cuda.stream(side):
            graph.capture_begin()
            try:
                outputs = call()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return Prepared(call, "eager", first_line(error))
    finally:
        if collecting:
            gc.enable()

    # The graph knows addresses only: the call holds what it reads, the outputs what it writes.
    held = call, outputs

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return held[1]

    return Prepared(replay, "graph")


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def interleave_events(calls: Mapping[str, Call], effort: Effort, clock: Clock) -> dict[str, Timing]:
    """Time each call, A B C A B C …, one call a sample, caches cold.

    Which candidate opens a round moves on by one each round. A call ten times slower than the fastest gets
    the least number of rounds. Nothing waits for the GPU within a round.
    """

    def sample(call: Call) -> tuple[Any, Any]:
        clock.flush()
        begin = clock.mark()
        call()
        return begin, clock.mark()

    first: dict[str, float] = {}
    for name, call in calls.items():
        marks = [sample(call) for _ in range(_WARMUP_CALLS)]
        clock.synchronize()
        first[name] = min(clock.elapsed_us(*pair) for pair in marks)
    fastest = min(first.values(), default=0.0)
    lasting = {name for name, value in first.items() if value <= _HOPELESS * fastest}
    # A tenth of a millisecond a sample goes to the flush and to Python.
    round_s = sum(first[name] + 100.0 for name in lasting) * 1e-6
    rounds = min(effort.max_rounds, max(effort.min_rounds, int(effort.budget_s / max(round_s, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            taken = {n: sample(calls[n]) for n in order if turn < effort.min_rounds or n in lasting}
            clock.synchronize()
            for name, pair in taken.items():
                samples[name].append(clock.elapsed_us(*pair))
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values, 1) for name, values in samples.items()}
