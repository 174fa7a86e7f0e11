"""How each kind of device prepares, times and weighs a candidate."""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .cuda_machine import CudaProbe, precision
from .cuda_timing import CudaClock, Prepared, capture, interleave_events
from .memory import peak_bytes
from .roofline import Probe
from .timing import Call, Effort, Timing, interleave


class Device(ABC):
    """A kind of device rows are measured on."""

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def probe(self) -> Probe:
        """What measures the roofline."""

    @abstractmethod
    def prepare(self, call: Callable[[], tuple[Tensor, ...]], graph: bool) -> Prepared:
        """The call as it will be timed; with ``graph`` captured where the device has such a thing."""

    @abstractmethod
    def time(self, calls: Mapping[str, Call], effort: Effort) -> dict[str, Timing]:
        """Interleaved timings."""

    @abstractmethod
    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Most bytes the call holds at one time beyond what was allocated before it."""

    @abstractmethod
    def tidy(self) -> None:
        """Give back what a row left in pools."""

    @abstractmethod
    def settings(self, dtype: str) -> contextlib.AbstractContextManager[None]:
        """Torch's switches as rows of ``dtype`` want them, restored afterwards."""


class Cpu(Device):
    name: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")

    def probe(self) -> Probe:
        return Probe()

    def prepare(self, call: Callable[[], tuple[Tensor, ...]], graph: bool) -> Prepared:
        return Prepared(call, "eager")

    def time(self, calls: Mapping[str, Call], effort: Effort) -> dict[str, Timing]:
        return interleave(calls, effort)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        return peak_bytes(call)

    def tidy(self) -> None:
        pass

    def settings(self, dtype: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Cuda(Device):
    name: ClassVar[str] = "cuda"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16", "tf32")

    def __init__(self) -> None:
        self._clock: CudaClock | None = None

    def probe(self) -> Probe:
        return CudaProbe()

    def prepare(self, call: Callable[[], tuple[Tensor, ...]], graph: bool) -> Prepared:
        return capture(call) if graph else Prepared(call, "eager")

    def time(self, calls: Mapping[str, Call], effort: Effort) -> dict[str, Timing]:
        if self._clock is None:
            self._clock = CudaClock()
        return interleave_events(calls, effort, self._clock)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def tidy(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def settings(self, dtype: str) -> Iterator[None]:
        with precision(dtype):
            yield


DEVICES: dict[str, type[Device]] = {"cpu": Cpu, "cuda": Cuda}


def get_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ValueError: "cuda" where torch sees no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda: torch {torch.__version__} sees no CUDA device here")
    return DEVICES[name]()
