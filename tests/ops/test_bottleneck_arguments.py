"""What the bottleneck convolution refuses, and the words it has for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bottleneck_problems import DEPTHWISE, PLAIN, RING, BottleneckCase
from torch import Tensor
from tucker2_bad_calls import raised

from tensorcomp_ext.ops import bottleneck_conv2d

OP = torch.ops.tensorcomp.bottleneck_conv2d


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def call(ring: Any = 2, **changes: Any) -> Tensor:
    tensors = {
        "x": zeros(2, 6, 7, 5),
        "core": zeros(3, 4, 3, 2),
        "factor_out": zeros(8, 6),
        "factor_in": zeros(6, 8),
        "bias": zeros(8),
    }
    return bottleneck_conv2d(**(tensors | {"ring": ring} | changes))  # type: ignore[arg-type]


def depthwise(**changes: Any) -> Tensor:
    weights = {"core": zeros(4, 1, 3, 2), "factor_out": zeros(8, 4), "factor_in": zeros(6, 4)}
    return call(**({"ring": 1, "depthwise": True} | weights | changes))


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "x": (lambda: call(x=zeros(6, 7, 5)), ValueError, "x must be [N, C_in, H, W], got [6, 7, 5]"),
    "x no tensor": (lambda: call(x=1.0), TypeError, "x must be a tensor, got float"),
    "core": (
        lambda: call(core=zeros(3, 4)),
        ValueError,
        "core must be [R_out, R_in, kH, kW], got [3, 4]",
    ),
    "core no tensor": (lambda: call(core=None), TypeError, "core must be a tensor, got NoneType"),
    "empty core": (
        lambda: call(core=zeros(3, 0, 3, 2)),
        ValueError,
        "core must be [R_out, R_in, kH, kW] with no empty mode, got [3, 0, 3, 2]",
    ),
    "depthwise core": (
        lambda: depthwise(core=zeros(4, 2, 3, 2)),
        ValueError,
        "core must be [R, 1, kH, kW] with no empty mode, got [4, 2, 3, 2]",
    ),
    "depthwise core's dims": (
        lambda: depthwise(core=zeros(4, 3, 2)),
        ValueError,
        "core must be [R, 1, kH, kW], got [4, 3, 2]",
    ),
    "ring of factor_out": (
        lambda: call(factor_out=zeros(8, 3)),
        ValueError,
        "factor_out must be [C_out, ring R_out] with ring R_out = 6, got [8, 3]",
    ),
    "ring of factor_in": (
        lambda: call(factor_in=zeros(6, 4)),
        ValueError,
        "factor_in must be [C_in, ring R_in] with ring R_in = 8, got [6, 4]",
    ),
    "factor_in's channels": (
        lambda: call(factor_in=zeros(5, 8)),
        ValueError,
        "factor_in must be [C_in, ring R_in] with C_in = 6, got [5, 8]",
    ),
    "depthwise factor_out": (
        lambda: depthwise(factor_out=zeros(8, 3)),
        ValueError,
        "factor_out must be [C_out, R] with R = 4, got [8, 3]",
    ),
    "depthwise factor_in": (
        lambda: depthwise(factor_in=zeros(6, 1)),
        ValueError,
        "factor_in must be [C_in, R] with R = 4, got [6, 1]",
    ),
    "without ring": (
        lambda: call(ring=1),
        ValueError,
        "factor_out must be [C_out, R_out] with R_out = 3, got [8, 6]",
    ),
    "bias": (lambda: call(bias=zeros(7)), ValueError, "bias must be [C_out] with C_out = 8, got [7]"),
    "dtype": (
        lambda: call(factor_in=zeros(6, 8, dtype=torch.float64)),
        TypeError,
        "factor_in must have x's dtype torch.float32, got torch.float64",
    ),
    "device": (
        lambda: call(core=zeros(3, 4, 3, 2, device="meta")),
        ValueError,
        "core must be on x's device cpu, got meta",
    ),
    "ring 0": (lambda: call(ring=0), ValueError, "ring must be an int >= 1, got 0"),
    "ring a float": (lambda: call(ring=2.0), TypeError, "ring must be an int >= 1, got 2.0"),
    "ring and depthwise": (
        lambda: depthwise(ring=2),
        ValueError,
        "ring must be 1 where depthwise=True, got 2",
    ),
    "stride": (lambda: call(stride=0), ValueError, "stride must be an int or a pair of ints >= 1, got 0"),
    "padding": (
        lambda: call(padding="full"),
        ValueError,
        "padding must be ints, 'same' or 'valid', got 'full'",
    ),
    "float padding": (
        lambda: call(padding=1.5),
        TypeError,
        "padding must be an int or a pair of ints >= 0, got 1.5",
    ),
    "dilation": (
        lambda: call(dilation=4),
        ValueError,
        "the padded input [7, 5] is smaller than the dilated kernel [3, 2] "
        "(padding (0, 0, 0, 0), dilation (4, 4))",
    ),
    "backend": (
        lambda: call(backend="fast"),
        ValueError,
        "backend must be None, 'native' or 'reference', got 'fast'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    made, kind, text = BAD[name]
    assert raised(made) == (kind.__name__, f"bottleneck_conv2d: {text}")


def test_what_fits_is_taken() -> None:
    assert call().shape == (2, 8, 5, 4) and depthwise().shape == (2, 8, 5, 4)


@pytest.mark.parametrize("case", [PLAIN, RING, DEPTHWISE], ids=str)
def test_the_dispatcher_refuses_too(case: BottleneckCase) -> None:
    """Also whoever calls ``torch.ops`` past the Python checks gets an error, never a wrong result."""
    a = case.make()
    assert a.bias is not None
    for wrong in (
        a._replace(x=a.x[:, 1:]),
        a._replace(x=a.x[0]),
        a._replace(factor_in=a.factor_in[:, 1:]),
        a._replace(factor_out=a.factor_out[:, 1:]),
        a._replace(core=a.core[0]),
        a._replace(bias=a.bias[1:]),
        a._replace(core=a.core.double()),
        a._replace(ring=a.ring + 1),
    ):
        # The shape function of compiled graphs and the kernels themselves.
        for device in ("meta", "cpu"):
            moved = wrong.with_tensors(t if t is None else t.to(device) for t in wrong.tensors)
            windows = (list(g) for g in a.geometry)
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                OP(*moved.tensors, *windows, moved.ring, moved.depthwise)


@pytest.mark.parametrize("case", [RING, DEPTHWISE], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty_batch(case: BottleneckCase, layout: str) -> None:
    leaves = case.but(n=0, layout=layout).make().leaves()
    y = bottleneck_conv2d(*leaves)
    assert y.shape == (0, 6, 7, 6)
    for tensor, gradient in zip(leaves.given, torch.autograd.grad(y.sum(), leaves.given), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()
