"""Problems that the tests of CP and tensor-ring convolutions share, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tucker2_problems import LAYOUTS, Device

from tensorcomp_ext import reference
from tensorcomp_ext.ops import cp_conv2d, tr_conv2d
from tensorcomp_ext.ops._conv_arguments import resolve_geometry

OPS = torch.ops.tensorcomp


@dataclass(frozen=True)
class WeightCase:
    """Sizes and geometry of one problem; ``ranks`` are (R,) of CP or (R0, Ra, Rb) of a tensor ring."""

    ranks: tuple[int, ...]
    n: int = 2
    c_in: int = 5
    c_out: int = 6
    size: tuple[int, int] = (7, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 1
    dilation: Any = 1
    bias: bool = True
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        return "cp_conv2d" if len(self.ranks) == 1 else "tr_conv2d"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        if len(self.ranks) == 1:
            return [(mode, self.ranks[0]) for mode in (self.c_out, self.c_in, *self.kernel)]
        ring, rank_in, rank_out = self.ranks
        taps = self.kernel[0] * self.kernel[1]
        return [(ring, self.c_in, rank_in), (rank_in, taps, rank_out), (rank_out, self.c_out, ring)]

    def make(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> list[Tensor]:
        """x, the parts of the weight and, with bias, the bias."""
        x = LAYOUTS[self.layout]((self.n, self.c_in, *self.size), dtype, device)
        parts = [torch.randn(shape).to(device, dtype) for shape in self.shapes]
        bias = [torch.randn(self.c_out).to(device, dtype)] if self.bias else []
        return [x, *parts, *bias]

    def call(self, way: str, tensors: list[Tensor], **options: Any) -> Tensor:
        """By "op", "function" or "oracle"; ``tensors`` as :meth:`make` gives them."""
        x, *parts = tensors
        bias = parts.pop() if self.bias else None
        windows: tuple[Any, ...] = (self.stride, self.padding, self.dilation)
        if way == "op":
            geometry = resolve_geometry(self.kernel, *windows)
            windows = tuple(list(g) for g in geometry)
        functions: dict[str, Callable[..., Tensor]] = {
            "op": getattr(OPS, self.name),
            "function": cp_conv2d if self.name == "cp_conv2d" else tr_conv2d,
            "oracle": getattr(reference, self.name),
        }
        if self.name == "cp_conv2d":
            return functions[way](x, parts, bias, *windows, **options)
        if self.kernel[0] != self.kernel[1]:
            options["kernel_size"] = self.kernel
        return functions[way](x, *parts, bias, *windows, **options)

    def oracle(self, tensors: list[Tensor]) -> Tensor:
        return self.call("oracle", [t.double() for t in tensors])

    def but(self, **changes: Any) -> WeightCase:
        return replace(self, **changes)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if k != "ranks" and v != getattr(WeightCase, k)}
        ranks = "x".join(map(str, self.ranks))
        return "-".join([self.name[:2], ranks, *(f"{k}={v}".replace(" ", "") for k, v in changed.items())])


CP = WeightCase((4,))
TR = WeightCase((2, 3, 4))
WEIGHTS = [
    *(CP.but(ranks=(r,)) for r in (1, 4, 17, 40)),
    *(TR.but(ranks=ranks) for ranks in ((1, 1, 1), (1, 3, 4), (2, 3, 4), (4, 1, 5), (10, 10, 10))),
    *(
        case.but(**change)
        for case in (CP, TR)
        for change in (
            {"c_in": 1, "c_out": 1, "bias": False},
            {"c_in": 33, "c_out": 17},
            {"kernel": (2, 3), "stride": (2, 1), "padding": [0, 2, 1, 1]},
            {"kernel": (1, 4), "dilation": (1, 2), "padding": "same"},
            {"kernel": (1, 1), "padding": "valid"},
            {"n": 0},
        )
    ),
]
