"""The GPU of a run: what it is, what drives it, and what it can do at best."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import _native
from .cases import DTYPES
from .roofline import Probe, Rate

_COPY_BYTES = 1 << 30
_MATMUL_SIZES = (4096, 8192)
_REPEATS = 12


def gpu() -> dict[str, Any]:
    """Name, driver, versions, switches, cache sizes and clocks of the current CUDA device."""
    properties = torch.cuda.get_device_properties()
    status = _native.cuda_status()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "allow_tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
            "note": "as found; rows of float32 run without, rows of tf32 with TF32",
        },
        "cudnn_benchmark": "on in every row",
        "native": {"ok": status.ok, "reason": status.reason},
        "clocks": clocks(),
    }


def driver_version() -> str | None:
    """Version of the kernel driver; None where nothing tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", text)
    if found:
        return found.group(1)
    version = _nvml(lambda nvml: nvml.nvmlSystemGetDriverVersion())
    return None if version is None else str(version)


def clocks() -> dict[str, int] | None:
    """Clocks in MHz now and at most, where NVML's Python module is there."""

    def read(nvml: Any) -> dict[str, int]:
        handle = nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        found = {}
        for name, kind in (("sm", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
            found[f"{name}_mhz"] = int(nvml.nvmlDeviceGetClockInfo(handle, kind))
            found[f"{name}_max_mhz"] = int(nvml.nvmlDeviceGetMaxClockInfo(handle, kind))
        return found

    return _nvml(read)


def _nvml(read: Callable[[Any], Any]) -> Any | None:
    """What ``read`` makes of NVML's Python module; None where there is none or it refuses."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        try:
            return read(nvml)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return None


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 on for rows of "tf32" and off for all others; cuDNN free to measure its algorithms."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = dtype == "tf32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


class CudaProbe(Probe):
    """Peak of the library's matrix product in each dtype, and bandwidth of a copy far beyond every cache."""

    def bandwidth(self, working_set: int, threads: int) -> Rate:
        """Bytes read plus written each second by a device-to-device copy: rows start with cold caches,
        whatever their size."""
        return super().bandwidth(_COPY_BYTES, 1)

    def peak(self, dtype: str, threads: int) -> Rate:
        return super().peak(dtype, 1)

    def _measure_peak(self, dtype: str, threads: int) -> Rate:
        best = Rate(0.0, "")
        with precision(dtype):
            for size in _MATMUL_SIZES:
                # Random numbers: a product of zeros runs faster than any real one.
                a, b = (torch.randn(size, size, device="cuda", dtype=DTYPES[dtype]) for _ in range(2))
                seconds = _fastest(lambda: torch.mm(a, b))  # noqa: B023
                rate = Rate(2 * size**3 / seconds, f"torch.mm {size}x{size}, random numbers")
                best = max(best, rate, key=lambda found: found.value)
        return best

    def _measure_bandwidth(self, working_set: int, threads: int) -> Rate:
        source = torch.zeros(working_set // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        seconds = _fastest(lambda: target.copy_(source))
        return Rate(2 * source.numel() / seconds, f"device-to-device copy of {source.numel() >> 20} MiB")


def _fastest(call: Any) -> float:
    """Seconds of the fastest of some calls, by events."""
    best = math.inf
    for turn in range(3 + _REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 3:
            best = min(best, begin.elapsed_time(end) * 1e-3)
    return best
