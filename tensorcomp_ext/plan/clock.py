"""How the seconds of a call are taken on each type of device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Call = Callable[[], object]

_LEAST_SWEEP = 1 << 25
_CPU_SWEEP = 1 << 21
"""Bytes for each thread: twice the second-level cache of a core, or half of a large one."""


class Clock(Protocol):
    """Takes the seconds of a call."""

    shortest: float
    """Seconds of the shortest sample worth taking; below it a sample should repeat the call."""

    def sample(self, call: Call, repeats: int = 1) -> float:
        """Seconds of one call, the mean of ``repeats``."""
        ...


class CpuClock:
    """The clock on the wall.

    Args:
        cold: sweep the second-level caches before each sample, as the layers around it do in a network: there
            a layer finds neither its weights nor what its call itself needs where its last call left them.
    """

    def __init__(self, cold: bool = False) -> None:
        # Without a sweep so long that the clock's own cost does not show; after one, only the first of
        # several calls would meet cold caches.
        self.shortest = 0.0 if cold else 5e-5
        bytes_swept = _CPU_SWEEP * torch.get_num_threads() if cold else 0
        self._sweep = torch.zeros(bytes_swept, dtype=torch.uint8, device="cpu") if cold else None

    def sample(self, call: Call, repeats: int = 1) -> float:
        """Seconds of one call, the mean of ``repeats``."""
        if self._sweep is not None:
            self._sweep.add_(1)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaClock:
    """Events on the current stream; before each sample the second-level cache is swept.

    A layer of a network finds its weights and its input where the layers before it have left the cache, not
    where its own last call has.

    Args:
        device: the device that the calls work on.
        queued: False: the call meets an idle device, so that the time to launch it counts wherever it is
            longer than the work, as it does in a network called layer by layer. True: the call is queued
            while the device is still sweeping, so that only the device's time counts, as in a replayed graph.
    """

    shortest = 0.0  # only the first of several calls would meet a cold cache

    def __init__(self, device: torch.device | str, queued: bool = False) -> None:
        self._device, self._queued = torch.device(device), queued
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        self._sweep = torch.empty(max(2 * cache, _LEAST_SWEEP), dtype=torch.uint8, device=self._device)

    def sample(self, call: Call, repeats: int = 1) -> float:
        """Seconds of one call, the mean of ``repeats``."""
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._sweep.zero_()
            if not self._queued:
                torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3 / repeats


def clock_for(device: torch.device | str, queued: bool = False, cold: bool = False) -> Clock:
    """The clock of a device; ``queued`` as in :class:`CudaClock`, ``cold`` as in :class:`CpuClock`."""
    found = torch.device(device)
    return CudaClock(found, queued) if found.type == "cuda" else CpuClock(cold)
