"""Peak memory of a call, as torch's own allocator sees it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that ``call`` holds at one time beyond what was allocated before it, its results included.

    Read from the profiler's allocation events, in order of time. Buffers a library takes from malloc directly
    (oneDNN's scratch space) are not seen.
    """
    call()
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's library prints a line at each start and stop, below Python's sys.stderr."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
