"""Problems that the tests of the bottleneck convolution share, on any device and in any dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tucker2_problems import LAYOUTS, NAMES, Case, Device

from tensorcomp_ext import reference
from tensorcomp_ext.ops._conv_arguments import Geometry, resolve_geometry


class BottleneckArguments(NamedTuple):
    """What the op takes."""

    x: Tensor
    core: Tensor
    factor_out: Tensor
    factor_in: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    ring: int
    depthwise: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]

    @property
    def given(self) -> list[Tensor]:
        return [t for t in self.tensors if t is not None]

    def with_tensors(self, tensors: Any) -> BottleneckArguments:
        return BottleneckArguments(*tensors, *self[5:])

    def double(self) -> BottleneckArguments:
        return self.with_tensors(t if t is None else t.detach().double() for t in self.tensors)

    def leaves(self, needed: tuple[bool, ...] = (True,) * 5) -> BottleneckArguments:
        """The same with tensors that ask for gradients where ``needed``, their strides kept."""
        return self.with_tensors(
            t if t is None else t.detach().requires_grad_(n)
            for t, n in zip(self.tensors, needed, strict=True)
        )

    @property
    def geometry(self) -> Geometry:
        return resolve_geometry(self.core.shape[2:], self.stride, self.padding, self.dilation)

    def explicit(self) -> tuple[Any, ...]:
        """Positional arguments of ``torch.ops.tensorcomp.bottleneck_conv2d``, without ``allow_tf32``."""
        return (*self.tensors, *(list(g) for g in self.geometry), self.ring, self.depthwise)

    def backward(self, grad: Tensor, mask: int = 31) -> tuple[Any, ...]:
        """Positional arguments of ``torch.ops.tensorcomp.bottleneck_conv2d_backward``."""
        windows = (list(g) for g in self.geometry)
        return (grad, *self.tensors[:4], *windows, mask, self.ring, self.depthwise)


@dataclass(frozen=True)
class BottleneckCase(Case):
    """Sizes and geometry of one problem; depthwise problems have ``rank_in`` ranks."""

    ring: int = 1
    depthwise: bool = False

    def make(  # type: ignore[override]
        self, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> BottleneckArguments:
        rank_out = self.rank_in if self.depthwise else self.rank_out
        inner = 1 if self.depthwise else self.rank_in

        def scaled(fan: int, *shape: int) -> Tensor:
            return (torch.randn(shape) / max(1, fan) ** 0.5).to(device, dtype)

        return BottleneckArguments(
            LAYOUTS[self.layout]((self.n, self.c_in, *self.size), dtype, device),
            scaled(inner * self.kernel[0] * self.kernel[1], rank_out, inner, *self.kernel),
            scaled(self.ring * rank_out, self.c_out, self.ring * rank_out),
            scaled(self.c_in, self.c_in, self.ring * self.rank_in),
            torch.randn(self.c_out).to(device, dtype) if self.bias else None,
            self.stride,
            self.padding,
            self.dilation,
            self.ring,
            self.depthwise,
        )

    def but(self, **changes: Any) -> BottleneckCase:
        return replace(self, **changes)

    __str__ = Case.__str__


PLAIN = BottleneckCase()
RING = BottleneckCase(ring=3)
DEPTHWISE = BottleneckCase(depthwise=True)
FORMS = [PLAIN, RING, DEPTHWISE]
"""One small problem of each form."""

BOTTLENECK_SIZES = [
    *(
        RING.but(ring=q, rank_in=a, rank_out=b)
        for q, a, b in ((2, 1, 1), (5, 4, 6), (10, 10, 10), (2, 17, 9))
    ),
    *(RING.but(c_in=c, c_out=t, ring=4, rank_in=5, rank_out=3) for c, t in ((1, 1), (17, 33), (64, 31))),
    *(DEPTHWISE.but(rank_in=r) for r in (1, 7, 16, 33, 129)),
    *(DEPTHWISE.but(c_in=c, c_out=t, rank_in=24) for c, t in ((1, 1), (17, 33), (64, 31))),
    *(form.but(size=size) for form in (RING, DEPTHWISE) for size in ((1, 1), (1, 17), (33, 7))),
    RING.but(bias=False),
    DEPTHWISE.but(bias=False),
    RING.but(n=0),
    DEPTHWISE.but(n=0),
]
"""Ranks, ring lengths and channels around the vector widths and tiles, one at a time."""

BOTTLENECK_GEOMETRIES = [
    form.but(**change)
    for form in (RING, DEPTHWISE)
    for change in (
        {"kernel": (1, 1), "padding": 0},
        {"padding": [3, 0, 1, 2]},
        {"padding": "same", "kernel": (2, 4)},
        {"padding": 9},
        {"stride": (1, 2), "size": (9, 20)},
        {"stride": 5, "padding": 4},
        {"dilation": (1, 2), "stride": (2, 1), "padding": (1, 0, 4, 3), "kernel": (3, 2)},
        {"kernel": (7, 1), "padding": (3, 0)},
    )
]


def bottleneck_oracle(arguments: BottleneckArguments) -> Tensor:
    return reference.bottleneck_conv2d(*arguments.double())


def bottleneck_gradients(arguments: BottleneckArguments, grad: Tensor) -> dict[str, Tensor]:
    """Float64 gradients of every tensor given."""
    leaves = arguments.double().leaves()
    given = {name: t for name, t in zip(NAMES, leaves.tensors, strict=True) if t is not None}
    y = reference.bottleneck_conv2d(*leaves)
    return dict(zip(given, torch.autograd.grad(y, list(given.values()), grad.double()), strict=True))
