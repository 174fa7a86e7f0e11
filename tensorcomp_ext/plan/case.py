"""The kind of call a plan is chosen for."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

_TF32 = "+tf32"


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype autocast computes in on a type of device; None where it is off or there is none (meta)."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class Case(NamedTuple):
    """Everything the choice of a plan may depend on beside the layer itself."""

    shape: tuple[int, ...]
    dtype: str
    """Computing dtype without the "torch." (the autocast dtype under autocast)."""
    layout: str
    device: str
    training: bool
    """True when gradients will be asked for."""
    threads: int
    prefer: str
    """"latency", or "memory": no dense copy of the weight may be kept."""
    tf32: bool = False
    """Whether the layer's float32 may be rounded to TF32; never outside CUDA."""

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def precision(self) -> str:
        """The computing dtype, and whether it may be rounded: "float32", "float32+tf32"."""
        return self.dtype + _TF32 * self.tf32

    def __str__(self) -> str:
        """The case as one word, the key under which tuned choices are stored; :meth:`parse` reads it."""
        mode = "training" if self.training else "inference"
        sizes = "x".join(map(str, self.shape))
        return f"{sizes}/{self.precision}/{self.layout}/{self.device}/{mode}/t{self.threads}/{self.prefer}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case a key stands for.

        Raises:
            ValueError: not such a key.
        """
        parts = text.split("/")
        try:
            sizes, precision, layout, device, mode, threads, prefer = parts
            shape = tuple(int(size) for size in sizes.split("x"))
            count, dtype = int(threads.removeprefix("t")), precision.removesuffix(_TF32)
            case = cls(
                shape, dtype, layout, device, mode == "training", count, prefer, precision.endswith(_TF32)
            )
        except ValueError as error:
            raise ValueError(
                f"plan key must read SHAPE/DTYPE/LAYOUT/DEVICE/MODE/tN/PREFER, got {text!r}"
            ) from error
        if str(case) != text:
            raise ValueError(f"plan key must read SHAPE/DTYPE/LAYOUT/DEVICE/MODE/tN/PREFER, got {text!r}")
        return case

    def distance(self, other: Case, spatial: int) -> float | None:
        """How far the batch of ``other`` is (log of the ratio); None when anything but the batch differs.

        Args:
            spatial: spatial dimensions of the layer; for a linear layer (0) all but the last size are batch.
        """
        if self[1:] != other[1:]:
            return None
        own, their = self.shape, other.shape
        if spatial:
            if own[1:] != their[1:]:
                return None
            rows, rows_there = own[0], their[0]
        else:
            if own[-1:] != their[-1:]:
                return None
            rows, rows_there = math.prod(own[:-1]), math.prod(their[:-1])
        return abs(math.log(max(rows, 1) / max(rows_there, 1)))
