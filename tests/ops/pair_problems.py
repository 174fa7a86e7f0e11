"""Problems that the tests of the two-factor linear layer share, on any device and in any dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tucker2_problems import Device

from tensorcomp_ext import reference

PAIR_NAMES = ("x", "a", "b", "bias")


@dataclass(frozen=True)
class PairCase:
    """Sizes of one problem; ``layout`` is how x and the factors lie in memory."""

    rows: tuple[int, ...] = (7,)
    c_in: int = 12
    rank: int = 5
    c_out: int = 9
    bias: bool = True
    layout: str = "contiguous"

    def make(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> list[Tensor | None]:
        """x, a, b and the bias or None."""

        def scaled(*shape: int) -> Tensor:
            return self._laid(torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(dtype)

        def placed(tensor: Tensor) -> Tensor:
            target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
            return target.copy_(tensor)

        bias = torch.randn(self.c_out).to(device, dtype) if self.bias else None
        x = self._laid(torch.randn(*self.rows, self.c_in))
        return [placed(x), placed(scaled(self.c_out, self.rank)), placed(scaled(self.rank, self.c_in)), bias]

    def _laid(self, tensor: Tensor) -> Tensor:
        """The same numbers in memory of this case's layout."""
        if self.layout == "contiguous" or tensor.dim() == 0:
            return tensor
        if self.layout == "slice":
            wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
            wide[..., 2:-1] = tensor
            return wide[..., 2:-1]
        if self.layout == "turned":
            order = list(range(tensor.dim()))[::-1]
            return tensor.permute(order).contiguous().permute(order)
        assert self.layout == "every_other"
        return tensor.repeat_interleave(2, -1)[..., ::2]

    def but(self, **changes: Any) -> PairCase:
        return replace(self, **changes)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(PairCase, k)}
        return "-".join(f"{k}={v}".replace(" ", "") for k, v in changed.items()) or "default"


PAIR_LAYOUTS = ("contiguous", "slice", "turned", "every_other")
PAIR_CASES = [
    PairCase(),
    *(PairCase(rows=rows) for rows in ((), (1,), (0,), (3, 5), (2, 0, 3), (2, 3, 4), (129,))),
    *(PairCase(rank=r) for r in (1, 7, 8, 16, 17, 64, 129)),
    *(PairCase(c_in=i, c_out=o) for i, o in ((1, 1), (1, 33), (33, 1), (64, 64), (127, 130))),
    PairCase(bias=False),
    PairCase(c_in=0),
    PairCase(c_out=0),
]
"""Rows, ranks and features around the vector widths and tiles, one at a time; empty ones too."""


def pair_oracle(tensors: list[Tensor | None]) -> Tensor:
    x, a, b, bias = (t if t is None else t.detach().double() for t in tensors)
    assert x is not None and a is not None and b is not None
    return reference.two_factor_linear(x, a, b, bias)


def pair_gradients(tensors: list[Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    """Float64 gradients of every tensor given."""
    exact = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    given = {name: t for name, t in zip(PAIR_NAMES, exact, strict=True) if t is not None}
    with torch.enable_grad():
        y = reference.two_factor_linear(*exact)  # type: ignore[arg-type]
    return dict(zip(given, torch.autograd.grad(y, list(given.values()), grad.double()), strict=True))
