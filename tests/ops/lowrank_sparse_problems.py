"""Problems that the tests of low-rank + sparse weights share, on any device and in any dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tucker2_problems import Device

from tensorcomp_ext import ops

LAYOUTS = ("contiguous", "slice", "turned", "every_other")


def laid(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in memory of another layout."""
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor.contiguous()
    if layout == "slice":
        wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
        wide[..., 2:-1] = tensor
        return wide[..., 2:-1]
    if layout == "turned":
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    assert layout == "every_other"
    return tensor.repeat_interleave(2, -1)[..., ::2]


@dataclass(frozen=True)
class WeightCase:
    """Sizes of one weight; ``layout`` is how its parts lie in memory, ``bits`` whether the mask is packed."""

    m: int = 9
    n: int = 13
    rank: int = 3
    kept: float = 0.3
    bits: bool = False
    layout: str = "contiguous"

    def mask(self, device: Device = "cpu") -> Tensor:
        """The bool mask."""
        return (torch.rand(self.m, self.n) < self.kept).to(device)

    def make(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> list[Tensor]:
        """a, b, values and the mask."""
        mask = self.mask()
        shapes = (self.m, self.rank), (self.rank, self.n), (self.m, self.n)
        tensors = [torch.randn(shape) / max(1, shape[0]) ** 0.5 for shape in shapes]
        parts = [t.to(device, dtype) for t in tensors] + [
            (ops.pack_mask(mask) if self.bits else mask).to(device)
        ]
        return [laid(t, self.layout) for t in parts]

    def but(self, **changes: Any) -> WeightCase:
        return replace(self, **changes)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(WeightCase, k)}
        return "-".join(f"{k}={v}".replace(" ", "") for k, v in changed.items()) or "default"


WEIGHT_CASES = [
    WeightCase(),
    *(WeightCase(m=m, n=n) for m, n in ((1, 1), (1, 33), (33, 1), (14, 32), (29, 65), (130, 127))),
    *(WeightCase(rank=r) for r in (0, 1, 8, 17, 129)),
    *(WeightCase(kept=k) for k in (0.0, 1.0)),
    WeightCase(m=0),
    WeightCase(n=0),
    WeightCase(m=40, n=8),
]
"""Sizes around the vector widths and tiles, one at a time; empty ones and masks of one value too."""
EVERY_WEIGHT = [case.but(bits=bits) for case in WEIGHT_CASES for bits in (False, True)]


def dense_weight(a: Tensor, b: Tensor, values: Tensor, mask: Tensor, mode: str) -> Tensor:
    """The weight in float64, spelled out; differentiable."""
    keep = (mask if mask.dtype == torch.bool else ops.unpack_mask(mask, values.shape[1])).double()
    low, sparse = a.double() @ b.double(), keep * values.double()
    return low + sparse if mode == "additive" else (1 - keep) * low + sparse


@dataclass(frozen=True)
class LinearCase:
    """Sizes of one layer n -> m; ``layout`` is how x and the factors lie in memory."""

    rows: tuple[int, ...] = (7,)
    n: int = 13
    rank: int = 3
    m: int = 9
    kept: float = 0.2
    positions: str = "bitmap"
    bias: bool = True
    layout: str = "contiguous"

    def sparse(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> ops.PackedSparse:
        """The packed part, with an empty and a full row where there are rows enough."""
        mask = torch.rand(self.m, self.n) < self.kept
        if self.m > 3:
            mask[1], mask[2] = False, True
        values = torch.randn(self.m, self.n) / max(1, self.n) ** 0.5
        return ops.pack_sparse(values.to(device, dtype), mask.to(device), positions=self.positions)

    def make(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> list[Any]:
        """x, a, b, the packed part and the bias or None."""

        def scaled(*shape: int) -> Tensor:
            return laid((torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(device, dtype), self.layout)

        x = laid(torch.randn(*self.rows, self.n).to(device, dtype), self.layout)
        bias = torch.randn(self.m).to(device, dtype) if self.bias else None
        factors = scaled(self.m, self.rank), scaled(self.rank, self.n)
        return [x, *factors, self.sparse(dtype, device), bias]

    def but(self, **changes: Any) -> LinearCase:
        return replace(self, **changes)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(LinearCase, k)}
        return "-".join(f"{k}={v}".replace(" ", "") for k, v in changed.items()) or "default"


LINEAR_CASES = [
    LinearCase(),
    *(LinearCase(rows=rows) for rows in ((), (1,), (0,), (3, 5), (2, 0, 3), (16,), (33,), (64,), (130,))),
    *(LinearCase(rank=r) for r in (1, 8, 17, 65)),
    *(LinearCase(n=n, m=m) for n, m in ((1, 1), (1, 33), (33, 1), (64, 64), (127, 130), (257, 40))),
    *(LinearCase(kept=k, n=40, m=35) for k in (0.0, 0.02, 1.0)),
    LinearCase(bias=False),
    LinearCase(n=0),
    LinearCase(m=0),
]
"""Rows, ranks and features around the vector widths and tiles, one at a time; empty ones too."""
EVERY_LINEAR = [case.but(positions=form) for case in LINEAR_CASES for form in ("bitmap", "columns")]


def dense_linear(x: Tensor, a: Tensor, b: Tensor, packed: ops.PackedSparse, bias: Tensor | None) -> Tensor:
    """The layer in float64 with its dense weight; differentiable."""
    weight = a.double() @ b.double() + ops.unpack_sparse(packed._replace(values=packed.values.double()))[0]
    return x.double() @ weight.t() + (0 if bias is None else bias.double())
