"""Problems, layouts and measures that the Tucker-2 convolution's tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorcomp_ext import reference
from tensorcomp_ext.ops._conv_arguments import Geometry, resolve_geometry

DTYPES = (torch.float32, torch.bfloat16)
FORWARD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
NAMES = ("x", "core", "factor_out", "factor_in", "bias")

Shape = tuple[int, int, int, int]
Device = str | torch.device


def _dense(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    return torch.randn(shape).to(device, dtype)  # the same numbers on every device


def _channels_last(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    return _dense(shape, dtype, device).contiguous(memory_format=torch.channels_last)


def _channel_slice(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    n, c, h, w = shape
    return _channels_last((n, c + 3, h, w), dtype, device)[:, 2 : 2 + c]


def _plane_slice(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    n, c, h, w = shape
    return _dense((n, c + 1, h + 2, w + 5), dtype, device)[:, 1:, 1 : 1 + h, 3 : 3 + w]


def _pixel_slice(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    n, c, h, w = shape
    return _channels_last((n, c, h + 2, w + 5), dtype, device)[:, :, 1 : 1 + h, 2 : 2 + w]


def _every_other(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    n, c, h, w = shape
    return _dense((n, c, 2 * h, 2 * w + 1), dtype, device)[:, :, ::2, 1::2]


def _every_other_channel(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    n, c, h, w = shape
    return _channels_last((n, 2 * c + 1, h, w), dtype, device)[:, 1::2]


def _reversed_order(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    n, c, h, w = shape
    return _dense((w, h, c, n), dtype, device).permute(3, 2, 1, 0)


def _rows_inside(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    n, c, h, w = shape
    return _dense((n, w, c, h), dtype, device).permute(0, 2, 3, 1)


def _expanded(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    n, c, h, w = shape
    return _dense((n, 1, h, 1), dtype, device).expand(n, c, h, w)


def _one_image(shape: Shape, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    return _dense((1, *shape[1:]), dtype, device).expand(shape)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": _dense,
    "channels_last": _channels_last,
    "channel_slice": _channel_slice,
    "plane_slice": _plane_slice,
    "pixel_slice": _pixel_slice,
    "every_other": _every_other,
    "every_other_channel": _every_other_channel,
    "reversed": _reversed_order,
    "rows_inside": _rows_inside,
    "expanded": _expanded,
    "one_image": _one_image,
}


class Arguments(NamedTuple):
    """What the op takes."""

    x: Tensor
    core: Tensor
    factor_out: Tensor
    factor_in: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]

    def with_tensors(self, tensors: Any) -> Arguments:
        return Arguments(*tensors, *self[5:])

    def double(self) -> Arguments:
        return self.with_tensors(t if t is None else t.detach().double() for t in self.tensors)

    def leaves(self, needed: tuple[bool, ...] = (True,) * 5) -> Arguments:
        """The same with tensors that ask for gradients where ``needed``, their strides kept."""
        return self.with_tensors(
            t if t is None else t.detach().requires_grad_(n)
            for t, n in zip(self.tensors, needed, strict=True)
        )

    @property
    def geometry(self) -> Geometry:
        return resolve_geometry(self.core.shape[2:], self.stride, self.padding, self.dilation)

    def explicit(self) -> tuple[Any, ...]:
        """Positional arguments of ``torch.ops.tensorcomp.tucker2_conv2d``."""
        return (*self.tensors, *(list(g) for g in self.geometry))


@dataclass(frozen=True)
class Case:
    """Sizes and geometry of one problem."""

    n: int = 2
    c_in: int = 5
    c_out: int = 6
    size: tuple[int, int] = (7, 6)
    rank_in: int = 3
    rank_out: int = 4
    kernel: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 1
    dilation: Any = 1
    bias: bool = True
    layout: str = "contiguous"

    def make(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Arguments:
        def scaled(*shape: int) -> Tensor:
            fan = max(1, torch.Size(shape[1:]).numel())
            return (torch.randn(shape) / fan**0.5).to(device, dtype)

        return Arguments(
            LAYOUTS[self.layout]((self.n, self.c_in, *self.size), dtype, device),
            scaled(self.rank_out, self.rank_in, *self.kernel),
            scaled(self.c_out, self.rank_out),
            (torch.randn(self.c_in, self.rank_in) / max(1, self.c_in) ** 0.5).to(device, dtype),
            torch.randn(self.c_out).to(device, dtype) if self.bias else None,
            self.stride,
            self.padding,
            self.dilation,
        )

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(type(self), k)}
        return "-".join(f"{k}={v}".replace(" ", "") for k, v in changed.items()) or "default"


SIZES = [
    *(Case(c_in=c, c_out=130 - c, rank_in=7, rank_out=9) for c in (1, 7, 16, 17, 129)),
    *(Case(c_in=19, c_out=t, rank_in=5, rank_out=6) for t in (1, 16, 17, 33)),
    *(
        Case(rank_in=r, rank_out=q)
        for r, q in ((1, 1), (1, 17), (7, 50), (16, 16), (17, 1), (31, 8), (50, 33))
    ),
    *(Case(size=(h, w)) for h, w in ((1, 1), (1, 17), (17, 1), (16, 16), (5, 129), (33, 7))),
    Case(n=1, c_in=64, c_out=64, size=(28, 28), rank_in=16, rank_out=16),
    Case(n=3, c_in=17, c_out=31, size=(14, 14), rank_in=13, rank_out=21, bias=False),
    Case(n=0),
    Case(n=0, layout="channels_last"),
]
"""Sizes around the vector widths, one mode at a time."""

GEOMETRIES = [
    Case(kernel=(1, 1), padding=0),
    Case(kernel=(1, 1), padding=2),
    Case(padding=0),
    Case(padding=(2, 0)),
    Case(padding=[3, 0, 1, 2]),
    Case(padding=(0, 4, 5, 0)),
    Case(padding=9),
    Case(size=(1, 1), padding=(2, 4)),
    Case(padding="valid"),
    Case(padding="same"),
    Case(padding="same", kernel=(2, 4)),
    Case(padding="same", kernel=(5, 2), dilation=(1, 3)),
    Case(kernel=(4, 2), padding=(1, 1)),
    Case(kernel=(7, 1), padding=(3, 0)),
    Case(kernel=(2, 2), stride=2, padding=0),
    Case(stride=2),
    Case(stride=(1, 2), size=(9, 20)),
    Case(stride=(2, 1), size=(9, 20)),
    Case(stride=(3, 4), kernel=(2, 2), size=(11, 13)),
    Case(stride=5, padding=4),
    Case(dilation=2, padding=2),
    Case(dilation=(3, 1), padding=(0, 3)),
    Case(dilation=(1, 2), stride=(2, 1), padding=(1, 0, 4, 3), kernel=(3, 2)),
]
"""Every way to spell a window; also windows mostly outside the image."""


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; NaN where one holds NaN; absolute where ``expected`` is zero."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not expected.numel():
        return 0.0
    norm = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (norm if norm > 0 else 1.0))


def oracle(arguments: Arguments) -> Tensor:
    return reference.tucker2_conv2d(*arguments.double())


def oracle_gradients(arguments: Arguments, grad: Tensor) -> dict[str, Tensor]:
    """Float64 gradients of every tensor given."""
    leaves = arguments.double().leaves()
    given = {name: t for name, t in zip(NAMES, leaves.tensors, strict=True) if t is not None}
    y = reference.tucker2_conv2d(*leaves)
    return dict(zip(given, torch.autograd.grad(y, list(given.values()), grad.double()), strict=True))
