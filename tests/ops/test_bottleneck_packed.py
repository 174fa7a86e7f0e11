"""Bottleneck convolutions for inference: packed weights, residual and ReLU in the store."""

from __future__ import annotations

import pytest
import torch
from bottleneck_problems import (
    BOTTLENECK_GEOMETRIES,
    BOTTLENECK_SIZES,
    DEPTHWISE,
    FORMS,
    PLAIN,
    RING,
    BottleneckArguments,
    BottleneckCase,
    bottleneck_oracle,
)
from torch import Tensor
from tucker2_problems import DTYPES, FORWARD_TOLERANCE, LAYOUTS, relative

from tensorcomp_ext.ops import bottleneck_conv2d
from tensorcomp_ext.ops.bottleneck_packed import (
    PackedBottleneck,
    bind_packed_bottleneck,
    bottleneck_geometry,
    pack_bottleneck,
)
from tensorcomp_ext.ops.tucker2_packed import pack_tucker2

pytestmark = pytest.mark.native

OPS = torch.ops.tensorcomp
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_form = pytest.mark.parametrize("case", FORMS, ids=str)
PLAIN_SIZES = [
    PLAIN.but(rank_in=r, rank_out=q, c_out=t)
    for r, q, t in ((1, 1, 1), (7, 50, 33), (16, 16, 17), (33, 17, 64))
]


def numbers(a: BottleneckArguments) -> list[int]:
    c_in, c_out = a.factor_in.shape[0], a.factor_out.shape[0]
    return bottleneck_geometry(a.core.shape, c_in, c_out, a.geometry, a.ring, a.depthwise)


def pack(a: BottleneckArguments) -> Tensor:
    return pack_bottleneck(a.core, a.factor_out, a.factor_in, a.ring, a.depthwise)


def bound(a: BottleneckArguments, relu: bool = False) -> PackedBottleneck:
    return bind_packed_bottleneck(pack(a), numbers(a), relu)


@dtypes
@pytest.mark.parametrize("case", [*FORMS, *BOTTLENECK_SIZES, *BOTTLENECK_GEOMETRIES], ids=str)
def test_equals_the_functional_op(isa: str, case: BottleneckCase, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        arguments = case.but(layout=layout).make(dtype)
        y = bound(arguments)(arguments.x, arguments.bias)
        expected = bottleneck_conv2d(*arguments, backend="native")
        assert torch.equal(y, expected) and y.stride() == expected.stride()


@dtypes
@pytest.mark.parametrize(
    "case", [*FORMS, *BOTTLENECK_SIZES, *PLAIN_SIZES, RING.but(stride=2), DEPTHWISE.but(stride=2)], ids=str
)
def test_residual_and_relu(isa: str, case: BottleneckCase, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            a = case.but(layout=layout).make(dtype)
            exact = bottleneck_oracle(a)
            residual = torch.randn_like(exact).to(dtype)
            residual = residual.contiguous(memory_format=torch._prims_common.suggest_memory_format(a.x))
            total = exact + residual.double()
            tolerance = FORWARD_TOLERANCE[dtype]
            assert relative(bound(a)(a.x, a.bias, residual), total) <= tolerance
            assert relative(bound(a, relu=True)(a.x, a.bias, residual), total.relu()) <= tolerance
            y = bound(a, relu=True)(a.x, a.bias)
            assert torch.equal(y, bound(a)(a.x, a.bias).relu())


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_residuals_of_any_strides(isa: str, layout: str, dtype: torch.dtype) -> None:
    for x_layout in ("contiguous", "channels_last"):
        a = PLAIN.but(layout=x_layout).make(dtype)
        residual = LAYOUTS[layout]((2, 6, 7, 6), dtype)
        found = bound(a)(a.x, a.bias, residual)
        assert torch.equal(found, bound(a)(a.x, a.bias, residual.contiguous()))
        assert relative(found, bottleneck_oracle(a) + residual.double()) <= FORWARD_TOLERANCE[dtype]


def test_the_input_is_its_own_residual() -> None:
    a = PLAIN.but(c_in=6, layout="channels_last").make()
    found = bound(a, relu=True)(a.x, a.bias, a.x)
    assert relative(found, (bottleneck_oracle(a) + a.x.double()).relu()) <= 1e-5


@dtypes
def test_relu_keeps_nan(isa: str, dtype: torch.dtype) -> None:
    a = PLAIN.but(c_in=6).make(dtype)
    residual = torch.full((2, 6, 7, 6), torch.nan, dtype=dtype)
    assert bound(a, relu=True)(a.x, a.bias, residual).isnan().all()


@every_form
def test_packed_once_serves_every_input(isa: str, case: BottleneckCase) -> None:
    first = case.make()
    packed = pack(first)
    kept = packed.clone()
    for changed in (case.but(n=1, size=(20, 31)), case.but(layout="every_other", stride=2, padding=0)):
        other = changed.make().with_tensors((changed.make().x, *first.tensors[1:]))
        y = bind_packed_bottleneck(packed, numbers(other))(other.x, other.bias)
        assert relative(y, bottleneck_oracle(other)) <= 1e-5
    assert torch.equal(packed, kept)


def test_what_was_packed_for_tucker2_serves() -> None:
    a = PLAIN.make()
    call = bind_packed_bottleneck(pack_tucker2(a.core, a.factor_out, a.factor_in), numbers(a))
    assert torch.equal(call(a.x, a.bias), bound(a)(a.x, a.bias))


@every_form
def test_opcheck(case: BottleneckCase) -> None:
    for layout in ("contiguous", "channels_last", "pixel_slice"):
        a = case.but(layout=layout, stride=2).make()
        residual = torch.randn_like(bottleneck_oracle(a)).float()
        torch.library.opcheck(
            OPS.bottleneck_conv2d_packed.default, (a.x, pack(a), a.bias, residual, numbers(a), True)
        )


def test_refuses_transforms() -> None:
    a = RING.make()
    packed = pack(a)

    def call(x: Tensor) -> Tensor:
        return OPS.bottleneck_conv2d_packed(x, packed, a.bias, None, numbers(a), False)

    with pytest.raises(RuntimeError, match="bottleneck_conv2d_packed: for inference only"):
        torch.func.jvp(call, (a.x,), (a.x,))
    assert not call(a.x.clone().requires_grad_()).requires_grad


def test_weights_of_another_form() -> None:
    """Ring and form are part of what the weights were packed for."""
    ring = RING.but(rank_in=4).make()
    for other in (0, 1, 2):
        geometry = numbers(ring)
        geometry[14] = other
        with pytest.raises(RuntimeError, match="pack them again"):
            bind_packed_bottleneck(pack(ring), geometry)(ring.x, None)
    geometry = numbers(ring)
    geometry[15] = 1
    with pytest.raises(RuntimeError, match="pack them again"):
        bind_packed_bottleneck(pack(ring), geometry)(ring.x, None)


def test_wrong_arguments() -> None:
    a = RING.make()
    packed, geometry = pack(a), numbers(a)
    assert len(geometry) == 16
    with pytest.raises(RuntimeError, match="geometry must hold 16 ints, got 14"):
        bind_packed_bottleneck(packed, geometry[:14])(a.x, None)
    call = bind_packed_bottleneck(packed, geometry)
    with pytest.raises(RuntimeError, match=r"residual must be .* = \[2, 6, 7, 6\], got \[2, 6, 7, 5\]"):
        call(a.x, None, torch.zeros(2, 6, 7, 5))
    with pytest.raises(RuntimeError, match="residual must lie on the CPU and have the dtype of x"):
        call(a.x, None, torch.zeros(2, 6, 7, 6).double())
    with pytest.raises(RuntimeError, match=r"bias must be \[C_out\] with C_out = 6, got \[5\]"):
        call(a.x, torch.zeros(5))
    with pytest.raises(RuntimeError, match="packed must come from bottleneck_conv2d_pack"):
        bind_packed_bottleneck(packed[:10], geometry)(a.x, None)
    with pytest.raises(ValueError, match=r"factor_in must be \[C_in, ring R_in\] with ring R_in = 9"):
        pack_bottleneck(a.core, a.factor_out, a.factor_in[:, 1:], 3)
    with pytest.raises(RuntimeError, match="weights must be float32 or bfloat16"):
        pack(a.double())
