"""What this machine reaches in the kinds of work plans are made of; measured once, in well under a second."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..ops.tucker2_conv import native_support, pack_tucker2, tucker2_conv2d_packed
from .cache import cache_directory, load, machine, store

_WIDTHS = (8, 32, 128)
_SECONDS = 0.012
_FILE = "rates.json"
_BUSY = 5e-4
"""Seconds of the smallest call above which other work disturbs the machine too much."""


@dataclass(frozen=True)
class Rates:
    """Multiply-adds a second by kind of work and width, bytes a second, and seconds every call costs."""

    macs: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    bandwidth: float = 1e10
    overhead: float = 1e-5

    def speed(self, kind: str, width: int) -> float:
        """Multiply-adds a second, interpolated in the logarithm of the width."""
        table = self.macs.get(kind) or self.macs.get("conv")
        if not table:
            return 1e10
        known = sorted(table)
        place = bisect_left(known, width)
        if place == 0:
            # Below the narrowest measured width vectors run part empty.
            return table[known[0]] * max(width, 1) / known[0]
        if place == len(known):
            return table[known[-1]]
        low, high = known[place - 1], known[place]
        share = math.log(width / low) / math.log(high / low)
        return table[low] ** (1 - share) * table[high] ** share

    def to_dict(self) -> dict[str, Any]:
        """In JSON types; :meth:`from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> Rates | None:
        """The rates of :meth:`to_dict`, or None if ``content`` is anything else."""
        try:
            macs = {str(k): {int(w): float(r) for w, r in t.items()} for k, t in content["macs"].items()}
            found = cls(macs, float(content["bandwidth"]), float(content["overhead"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        figures = [found.bandwidth, *(r for t in macs.values() for r in t.values())]
        return found if all(math.isfinite(f) and f > 0 for f in figures) and found.overhead >= 0 else None


def _seconds(call: Callable[[], object], synchronise: Callable[[], None]) -> float:
    """Least seconds of a call after a warm-up: what the machine reaches when nothing else runs."""
    call()
    samples: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(samples) < 3 or (time.perf_counter() < end and len(samples) < 200):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        samples.append(time.perf_counter() - start)
    return min(samples)


def measure(dtype: torch.dtype, device: str) -> Rates:
    """Measure convolution, pointwise, matrix and fused speeds, bandwidth and call overhead in 0.3 s."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    macs: dict[str, dict[int, float]] = {"conv": {}, "pointwise": {}, "linear": {}, "fused": {}}
    with torch.inference_mode():
        tiny = (torch.ones(1, 8, 4, 4, **options), torch.ones(8, 8, 3, 3, **options))
        overhead = _seconds(partial(F.conv2d, *tiny), synchronise)
        big, target = torch.ones(1 << 22, **options), torch.empty(1 << 22, **options)
        bandwidth = 2 * big.numel() * big.element_size() / _seconds(lambda: target.copy_(big), synchronise)
        for width in _WIDTHS:
            x = torch.ones(1, width, 28, 28, **options)
            kernel = torch.ones(width, width, 3, 3, **options)
            point = torch.ones(width, width, 1, 1, **options)
            rows, matrix = torch.ones(4096, width, **options), torch.ones(width, width, **options)
            calls: dict[str, tuple[int, Callable[[], object]]] = {
                "conv": (26 * 26 * kernel.numel(), partial(F.conv2d, x, kernel)),
                "pointwise": (28 * 28 * point.numel(), partial(F.conv2d, x, point)),
                "linear": (4096 * matrix.numel(), partial(F.linear, rows, matrix)),
            }
            outer = torch.ones(2 * width, width, **options)
            wide = torch.ones(1, 2 * width, 28, 28, **options).contiguous(memory_format=torch.channels_last)
            if native_support(wide, kernel, outer, outer):
                packed = pack_tucker2(kernel, outer, outer)
                arguments = (wide, packed, tuple(kernel.shape), 2 * width, None, 1, 1, 1)
                work = 28 * 28 * (kernel.numel() + 2 * outer.numel())
                calls["fused"] = (work, partial(tucker2_conv2d_packed, *arguments))
            for kind, (work, call) in calls.items():
                spent = _seconds(call, synchronise)
                # At most half is taken for overhead: a call lighter than a convolution has less of it.
                macs[kind][width] = work / max(spent - overhead, spent / 2, 1e-9)
    return Rates({k: t for k, t in macs.items() if t}, bandwidth, overhead)


_known: dict[str, Rates] = {}


def rates(dtype: torch.dtype, device: str, threads: int) -> Rates:
    """This machine's rates: from memory, from the cache file, or measured now and kept in both.

    Rates measured while the machine is busy serve this process only.
    """
    if device not in ("cpu", "cuda"):
        return Rates()
    key = f"{machine(device)}, {threads} threads, {str(dtype).removeprefix('torch.')}"
    found = _known.get(key)
    if found is None:
        path = cache_directory() / _FILE
        found = Rates.from_dict(load(path).get(key))
        if found is None:
            found = measure(dtype, device)
            if found.overhead < _BUSY:
                store(path, key, found.to_dict())
        _known[key] = found
    return found
