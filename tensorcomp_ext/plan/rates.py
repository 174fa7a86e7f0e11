"""What this machine reaches in the kinds of work plans are made of; measured once, in well under a second."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch

from .. import _native
from .cache import cache_directory, load, machine, store
from .clock import clock_for
from .precision import tf32_state
from .workload import BUILT, seconds_of, workload

_FILE = "rates.json"
CACHE = 1 << 19
"""Bytes that stay in the cache from one call to the next."""
_STAND_INS = {"pair": "linear", "chain": "linear", "sparse": "linear"}
"""Kinds that take the rates of others than convolutions where they are not measured."""
_BUSY = 5e-4
"""Seconds of the smallest call above which other work disturbs the machine too much."""
_FALL, _RISE = 4.0, 100.0
"""By how much no kind of work gets slower, and none faster, from one width to the next."""
_ROUNDS = 3
"""Times that rates are measured at the most, until they fit together."""


@dataclass(frozen=True)
class Rates:
    """Multiply-adds a second by kind of work and width, bytes a second, and seconds every call costs."""

    macs: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    bandwidth: float = 1e10
    overhead: float = 1e-5
    cached: float = 0.0
    """Bytes a second of what fits the cache; 0 where that was not measured."""

    @property
    def cache_bandwidth(self) -> float:
        """Bytes a second within the cache."""
        return max(self.cached, self.bandwidth)

    def transfer(self, count: float) -> float:
        """Seconds to read or write so many bytes: few of them lie in the cache."""
        return count / (self.cache_bandwidth if count <= CACHE else self.bandwidth)

    def speed(self, kind: str, width: int) -> float:
        """Multiply-adds a second, interpolated in the logarithm of the width."""
        stand_in = self.macs.get(_STAND_INS.get(kind, "conv")) or self.macs.get("conv")
        table = self.macs.get(kind) or stand_in
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

    @property
    def disturbed(self) -> bool:
        """Whether other work must have been measured along: calls that take long, rates that do not fit."""
        steps = [
            (table[low], table[high]) for table in self.macs.values() for low, high in pairwise(sorted(table))
        ]
        return self.overhead >= _BUSY or any(
            _FALL * wide < narrow or wide > _RISE * narrow for narrow, wide in steps
        )

    def best(self, other: Rates) -> Rates:
        """Of two measurements of the same kinds of work the faster one of each figure."""
        macs = {
            kind: {width: max(rate, other.macs[kind][width]) for width, rate in table.items()}
            for kind, table in self.macs.items()
        }
        return Rates(
            macs,
            max(self.bandwidth, other.bandwidth),
            min(self.overhead, other.overhead),
            max(self.cached, other.cached),
        )

    def to_dict(self) -> dict[str, Any]:
        """In JSON types; :meth:`from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> Rates | None:
        """The rates of :meth:`to_dict`, or None if ``content`` is anything else."""
        try:
            macs = {str(k): {int(w): float(r) for w, r in t.items()} for k, t in content["macs"].items()}
            found = cls(macs, *(float(content[name]) for name in ("bandwidth", "overhead", "cached")))
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        figures = [found.bandwidth, *(r for t in macs.values() for r in t.values())]
        least = min(found.overhead, found.cached)
        return found if all(math.isfinite(f) and f > 0 for f in figures) and least >= 0 else None


def measure(dtype: torch.dtype, device: str) -> Rates:
    """Measure the speed of every kind of work, bandwidth and call overhead in 0.3 s."""
    clock = clock_for(device, queued=True)
    with torch.inference_mode():
        work = workload(dtype, device)
        overhead = seconds_of(work.tiny, clock_for(device))
        # What even an empty sample takes: on CUDA less than a call costs where it is launched.
        spared = overhead if work.host else seconds_of(work.tiny, clock)
        bandwidth = work.copied / seconds_of(work.copy, clock)
        cached = work.copied_near / max(seconds_of(work.copy_near, clock) - spared / 2, 1e-9)
        macs: dict[str, dict[int, float]] = {}
        for width in work.widths:
            for kind, (count, call) in work.calls(width).items():
                spent = seconds_of(call, clock)
                # At most half is taken for overhead: a call lighter than a convolution has less of it.
                macs.setdefault(kind, {})[width] = count / max(spent - spared, spent / 2, 1e-9)
    return Rates(macs, bandwidth, overhead, cached)


_known: dict[str, Rates] = {}


def rates(dtype: torch.dtype, device: str, threads: int) -> Rates:
    """This machine's rates: from memory, from the cache file, or measured now and kept in both.

    Rates that other work disturbed are measured again, and if they still do not fit together, serve this
    process only. On CUDA they are those of float32 as
    torch rounds it now; where nothing can be measured, because the memory is full or a graph is being
    captured, guesses serve until it can.

    Args:
        device: "cpu", "cuda" or with an index; others have no rates but guesses.
        threads: threads of a call on the CPU.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return Rates()
    key = _key(dtype, device, threads) if kind == "cpu" else _cuda_key(dtype, device)
    found = _known.get(key)
    if found is None:
        path = cache_directory() / _FILE
        found = Rates.from_dict(load(path).get(key))
        if found is None or found.disturbed:
            if kind == "cuda" and torch.cuda.is_current_stream_capturing():
                return Rates()
            try:
                found = measure(dtype, device)
                for _ in range(_ROUNDS - 1):
                    if not found.disturbed:
                        break
                    found = found.best(measure(dtype, device))
            except torch.OutOfMemoryError:
                return Rates()
            if not found.disturbed:
                store(path, key, found.to_dict())
        _known[key] = found
    return found


def _key(dtype: torch.dtype, device: str, threads: int) -> str:
    kernels = ", ".join(sorted(name for name, built in BUILT.items() if built)) or "library kernels"
    return f"{machine(device)}, {kernels}, {threads} threads, {str(dtype).removeprefix('torch.')}"


def _cuda_key(dtype: torch.dtype, device: str) -> str:
    """Threads of the CPU do not matter here; what TF32 is allowed and whether our kernels are there does."""
    precision = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        allowed = tf32_state("cuda")
        precision += "".join(f"+tf32 {name}" for name, on in allowed._asdict().items() if on)
    kernels = "fused kernels" if _native.cuda_status().ok else "library kernels"
    return f"{machine(device)}, {kernels}, {precision}"
