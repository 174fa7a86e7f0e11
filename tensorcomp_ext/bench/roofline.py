"""What the machine can do at best, measured in the same run: multiply-add peak and copy bandwidth."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch

from .cases import DTYPES

_PROBE_S = 0.1
_REPEATS = 5


@dataclass(frozen=True)
class Rate:
    """FLOP/s or bytes/s over all threads together, and how it was measured."""

    value: float
    how: str

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "how": self.how}


@dataclass(frozen=True)
class Roofline:
    """Least time a problem can take: ``max(FLOPs / peak, bytes / bandwidth)``."""

    flops: int
    bytes: int
    working_set: int
    peak: Rate
    bandwidth: Rate

    @property
    def seconds(self) -> float:
        return max(self.flops / self.peak.value, self.bytes / self.bandwidth.value)

    @property
    def bound(self) -> str:
        return "compute" if self.flops / self.peak.value >= self.bytes / self.bandwidth.value else "memory"

    def to_dict(self) -> dict[str, Any]:
        return {
            "time_us": self.seconds * 1e6,
            "bound": self.bound,
            "flops": self.flops,
            "bytes": self.bytes,
            "working_set": self.working_set,
            "peak_gflops": self.peak.value / 1e9,
            "bandwidth_gbs": self.bandwidth.value / 1e9,
        }


class Sized(Protocol):
    """What :func:`work` counts: a problem of factors, such as :class:`Case`."""

    @property
    def dtype(self) -> str | None: ...

    def macs(self) -> int: ...

    def elements(self) -> tuple[int, int, int]: ...


def work(case: Sized, direction: str) -> tuple[int, int]:
    """FLOPs and bytes that no algorithm working on the factors can avoid.

    Forward: 2 FLOPs a MAC; reads input and weights, writes the output. A training step: each of the three
    stages takes two more products (gradient of its input, of its weight), so three times the forward's FLOPs,
    without recomputation; backward reads the input and the output's gradient, and writes the input's; weights
    are read twice and their gradients written once.
    """
    size = DTYPES[case.dtype or "float32"].itemsize
    inputs, outputs, weights = case.elements()
    if direction == "forward":
        return 2 * case.macs(), size * (inputs + outputs + weights)
    return 6 * case.macs(), size * (3 * inputs + 2 * outputs + 3 * weights)


def native_module() -> ModuleType | None:
    """The pybind11 module, or None in an install without native code."""
    try:
        return importlib.import_module("tensorcomp_ext._C")
    except ImportError:
        return None


class Probe:
    """Measures rates on demand and remembers them for the run."""

    def __init__(self, seconds: float = _PROBE_S) -> None:
        self._seconds = seconds
        self._native = native_module()
        self._peaks: dict[tuple[str, int], Rate] = {}
        self._bandwidths: dict[tuple[int, int], Rate] = {}

    def peak(self, dtype: str, threads: int) -> Rate:
        """FLOP/s of independent multiply-adds, inputs in ``dtype``, accumulation in float32."""
        key = (dtype, threads)
        if key not in self._peaks:
            self._peaks[key] = self._measure_peak(dtype, threads)
        return self._peaks[key]

    def bandwidth(self, working_set: int, threads: int) -> Rate:
        """Bytes read plus bytes written each second by a copy whose source and destination together hold
        ``working_set`` bytes (rounded up to a power of two, 16 KiB at least)."""
        size = max(16 * 1024, 1 << math.ceil(math.log2(max(working_set, 2))))
        key = (size, threads)
        if key not in self._bandwidths:
            self._bandwidths[key] = self._measure_bandwidth(size, threads)
        return self._bandwidths[key]

    def roofline(self, case: Sized, direction: str, threads: int) -> Roofline:
        """The bound for one row; the bandwidth is that of a working set like the case's input and output."""
        flops, moved = work(case, direction)
        inputs, outputs, _ = case.elements()
        working_set = (inputs + outputs) * DTYPES[case.dtype or "float32"].itemsize
        if direction != "forward":
            working_set *= 2
        return self.bound(flops, moved, working_set, case.dtype or "float32", threads)

    def bound(self, flops: int, moved: int, working_set: int, dtype: str, threads: int) -> Roofline:
        """The bound for so many FLOPs and bytes, at the rates of ``dtype`` and of such a working set."""
        return Roofline(
            flops, moved, working_set, self.peak(dtype, threads), self.bandwidth(working_set, threads)
        )

    def to_dict(self) -> dict[str, Any]:
        """Every rate measured so far."""
        return {
            "peak_flops": [
                {"dtype": dtype, "threads": threads, **rate.to_dict()}
                for (dtype, threads), rate in self._peaks.items()
            ],
            "copy_bandwidth": [
                {"working_set": size, "threads": threads, **rate.to_dict()}
                for (size, threads), rate in sorted(self._bandwidths.items())
            ],
        }

    def _measure_peak(self, dtype: str, threads: int) -> Rate:
        # A matrix product bounds the peak from below, should the probe not reach it.
        a = torch.randn(1024, 1024).to(DTYPES[dtype])
        product = Rate(
            2 * 1024**3 / _fastest(lambda: torch.mm(a, a), threads, self._seconds), "torch.mm 1024x1024"
        )
        if self._native is None:
            return product
        probe = self._native.fma_peak
        total = _together(lambda: float(probe(bfloat16=dtype == "bfloat16", seconds=self._seconds)), threads)
        native = Rate(total, "fma_peak: independent multiply-adds in registers, all threads at once")
        return max(native, product, key=lambda rate: rate.value)

    def _measure_bandwidth(self, working_set: int, threads: int) -> Rate:
        if self._native is not None:
            probe = self._native.copy_bandwidth
            buffer = working_set // 2 // threads
            total = _together(lambda: float(probe(bytes=buffer, seconds=self._seconds)), threads)
            return Rate(
                total, "copy_bandwidth: bytes read plus written, one pair of buffers a thread, all at once"
            )
        source = torch.zeros(working_set // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        best = _fastest(lambda: target.copy_(source), threads, self._seconds)
        return Rate(working_set / best, "torch copy_ (no native probe)")


def _together(probe: Callable[[], float], threads: int) -> float:
    """Sum over threads that run the probe at the same time; the best of some repeats."""
    with ThreadPoolExecutor(threads) as pool:
        return max(
            sum(f.result() for f in [pool.submit(probe) for _ in range(threads)]) for _ in range(_REPEATS)
        )


def _fastest(call: Callable[[], object], threads: int, seconds: float) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call()
        best = math.inf
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return best
    finally:
        torch.set_num_threads(before)
