"""The Tucker-2 convolution against its oracle, on every instruction set of this machine."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from tucker2_problems import (
    DTYPES,
    FORWARD_TOLERANCE,
    GEOMETRIES,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    NAMES,
    SIZES,
    Arguments,
    Case,
    oracle,
    oracle_gradients,
    relative,
)

from tensorcomp_ext.ops import tucker2_conv2d
from tensorcomp_ext.ops.tucker2_conv import native_support

pytestmark = pytest.mark.native

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
MIXED = Case(n=3, c_in=7, c_out=17, size=(9, 13), rank_in=9, rank_out=5)


def forward(arguments: Arguments) -> Tensor:
    return tucker2_conv2d(*arguments, backend="native")


def gradients(
    arguments: Arguments, grad: Tensor, needed: tuple[bool, ...] = (True,) * 5
) -> dict[str, Tensor]:
    leaves = arguments.leaves(needed)
    wanted = {
        name: t for name, t in zip(NAMES, leaves.tensors, strict=True) if t is not None and t.requires_grad
    }
    found = torch.autograd.grad(forward(leaves), list(wanted.values()), grad)
    return dict(zip(wanted, found, strict=True))


def check_forward(case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(dtype)
    y = forward(arguments)
    assert y.dtype == dtype
    assert relative(y, oracle(arguments)) <= FORWARD_TOLERANCE[dtype]


def check_gradients(case: Case, dtype: torch.dtype, grad_layout: str = "contiguous") -> None:
    arguments = case.make(dtype)
    grad = LAYOUTS[grad_layout](tuple(oracle(arguments).shape), dtype)
    found, expected = gradients(arguments, grad), oracle_gradients(arguments, grad)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert relative(gradient, expected[name]) <= GRADIENT_TOLERANCE[dtype], name


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SIZES, ids=str)
class TestSizes:
    def test_matches_reference(self, isa: str, case: Case, layout: str, dtype: torch.dtype) -> None:
        check_forward(case.but(layout=layout), dtype)

    def test_gradients(self, isa: str, case: Case, layout: str, dtype: torch.dtype) -> None:
        check_gradients(case.but(layout=layout), dtype, layout)


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
class TestWindows:
    def test_matches_reference(self, isa: str, case: Case, layout: str, dtype: torch.dtype) -> None:
        check_forward(case.but(layout=layout), dtype)

    def test_gradients(self, isa: str, case: Case, layout: str, dtype: torch.dtype) -> None:
        check_gradients(case.but(layout=layout), dtype, layout)


@dtypes
@pytest.mark.parametrize("stride", [1, (1, 2), 2])
@pytest.mark.parametrize("layout", LAYOUTS)
class TestLayouts:
    def test_matches_reference(self, isa: str, layout: str, stride: int, dtype: torch.dtype) -> None:
        for c_in, bias in ((7, True), (16, False)):
            check_forward(MIXED.but(layout=layout, stride=stride, c_in=c_in, bias=bias), dtype)

    def test_gradients(self, isa: str, layout: str, stride: int, dtype: torch.dtype) -> None:
        others = ("contiguous", "channels_last", "expanded", "every_other", layout)
        for grad_layout in dict.fromkeys(others):
            check_gradients(MIXED.but(layout=layout, stride=stride), dtype, grad_layout)


@dtypes
def test_weights_of_any_strides(isa: str, dtype: torch.dtype) -> None:
    dense = MIXED.make(dtype)
    core = torch.empty(9 + 1, 5 + 2, 3, 3, dtype=dtype).permute(1, 0, 3, 2)[2:, 1:]
    factor_out, factor_in = torch.empty(5, 17, dtype=dtype).t(), torch.empty(7, 20, dtype=dtype)[:, 1:19:2]
    bias = torch.empty(35, dtype=dtype)[1::2]
    strided = (core, factor_out, factor_in, bias)
    for target, source in zip(strided, dense.tensors[1:], strict=True):
        assert source is not None and not target.is_contiguous()
        target.copy_(source)
    arguments = dense.with_tensors((dense.x, *strided))
    y = forward(arguments)
    assert torch.equal(y, forward(dense))
    expected = gradients(dense, y)
    for name, gradient in gradients(arguments, y).items():
        assert torch.equal(gradient, expected[name]), name


@dtypes
@pytest.mark.parametrize("case", [MIXED, MIXED.but(layout="channels_last", stride=2, padding=0)], ids=str)
def test_only_the_gradients_asked_for(isa: str, case: Case, dtype: torch.dtype) -> None:
    """Every combination of ``needs_input_grad``: what is computed does not depend on what else is."""
    arguments = case.make(dtype)
    grad = torch.randn_like(forward(arguments))
    expected = oracle_gradients(arguments, grad)
    for needed in itertools.product((False, True), repeat=5):
        if not any(needed):
            assert not forward(arguments.leaves(needed)).requires_grad
            continue
        found = gradients(arguments, grad, needed)
        assert set(found) == {name for name, n in zip(NAMES, needed, strict=True) if n}
        for name, gradient in found.items():
            assert relative(gradient, expected[name]) <= GRADIENT_TOLERANCE[dtype], (needed, name)


THREADED = [
    Case(n=1, c_in=64, c_out=33, size=(7, 7), rank_in=31, rank_out=39),
    Case(n=2, c_in=32, c_out=48, size=(19, 23), rank_in=17, rank_out=12, stride=2),
    Case(n=5, c_in=16, c_out=16, size=(16, 16), rank_in=6, rank_out=6, kernel=(2, 3), padding="same"),
]


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_other"])
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_bitwise_reproducible(isa: str, case: Case, layout: str, dtype: torch.dtype) -> None:
    """Forward for any number of threads; gradients from run to run with a number of threads."""
    arguments = case.but(layout=layout).make(dtype)
    y = forward(arguments)
    grad = torch.randn_like(y)
    expected = oracle_gradients(arguments, grad)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(forward(arguments), y)
        once, again = gradients(arguments, grad), gradients(arguments, grad)
        for name, gradient in once.items():
            assert torch.equal(gradient, again[name]), name
            assert relative(gradient, expected[name]) <= GRADIENT_TOLERANCE[dtype], name


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(layout="channels_last", stride=2, bias=False),
        Case(layout="plane_slice", padding="same"),
        Case(n=0),
    ],
    ids=str,
)
def test_opcheck(isa: str, case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(dtype)
    tolerances = {"atol": GRADIENT_TOLERANCE[dtype], "rtol": GRADIENT_TOLERANCE[dtype]}
    torch.library.opcheck(
        torch.ops.tensorcomp.tucker2_conv2d.default, arguments.leaves().explicit(), **tolerances
    )
    x, core, factor_out, factor_in, _, *geometry = arguments.explicit()
    for mask in (31, 0b10101):
        torch.library.opcheck(
            torch.ops.tensorcomp.tucker2_conv2d_backward.default,
            (forward(arguments), x, core, factor_out, factor_in, *geometry, mask),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_whatever_native_code_cannot_take_has_a_reason() -> None:
    arguments = Case().make()
    assert native_support(*arguments).ok and not native_support(*arguments).reason
    refused = native_support(*arguments.double())
    assert not refused.ok and "float64" in refused.reason
    with pytest.raises(
        ValueError, match=r"backend='native' cannot serve: .*float32 and bfloat16, not .*float64"
    ):
        tucker2_conv2d(*arguments.double(), backend="native")
    on_meta = arguments.with_tensors(t.to("meta") for t in arguments.tensors if t is not None)
    assert "'meta'" in native_support(*on_meta).reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_take_the_oracle(dtype: torch.dtype) -> None:
    arguments = Case(padding=(2, 0, 1, 3)).make(dtype)
    expected = oracle(arguments)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-3
    for y in (tucker2_conv2d(*arguments), torch.ops.tensorcomp.tucker2_conv2d(*arguments.explicit())):
        assert y.dtype == dtype
        assert relative(y, expected) <= tolerance
