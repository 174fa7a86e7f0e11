"""The low-rank + sparse linear layer of the emulated CUDA ops against the dense one in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_problems import (
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    check_like_fake,
    inside,
    no_reference,
    shifted,
    turned,
)
from lowrank_sparse_problems import EVERY_LINEAR, LAYOUTS, LinearCase, dense_linear
from torch import Tensor
from tucker2_problems import relative

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = ("x", "a", "b", "values", "bias")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
FEW = [c for c in EVERY_LINEAR if c.n and c.m and torch.Size(c.rows).numel() <= 32]
LAID_OUT = [c.but(layout=layout) for layout in LAYOUTS[1:] for c in FEW[::5]]
MORE = [
    LinearCase(rows=(4, 8), n=300, m=70, positions=positions, kept=0.1) for positions in ("bitmap", "columns")
]


def call(ops: Any, arguments: list[Any]) -> Tensor:
    x, a, b, packed, bias = arguments
    return ops.lowrank_sparse_linear(x, a, b, packed.values, bias, packed.offsets, packed.positions)


def exact_gradients(arguments: list[Any], dy: Tensor) -> dict[str, Tensor]:
    x, a, b, packed, bias = arguments
    bias = torch.zeros(a.shape[0]) if bias is None else bias
    exact = [t.detach().double().requires_grad_() for t in (x, a, b, packed.values, bias)]
    y = dense_linear(*exact[:3], packed._replace(values=exact[3]), exact[4])
    return dict(zip(NAMES, torch.autograd.grad(y, exact, dy.double()), strict=True))


def check(ops: Any, arguments: list[Any], dtype: str, dy: Tensor | None = None) -> None:
    """y and every gradient, from the kernels alone; intermediate results are rounded to the dtype."""
    x, a, b, packed, bias = arguments
    expected = dense_linear(*arguments)
    dy = torch.randn(expected.shape).to(x.dtype) if dy is None else dy
    back = (dy, x, a, b, *packed[:3], 31)
    with no_reference():
        y = call(ops, arguments)
        found = ops.lowrank_sparse_linear_backward(*back)
    assert y.dtype == x.dtype and relative(y, expected) <= FORWARD_TOLERANCE[dtype]
    check_like_fake("lowrank_sparse_linear", y, x, a, b, packed[0], bias, *packed[1:3])
    check_like_fake("lowrank_sparse_linear_backward", found, *back)
    for gradient, (name, exact) in zip(found, exact_gradients(arguments, dy).items(), strict=True):
        assert relative(gradient, exact) <= GRADIENT_TOLERANCE[dtype], name


@every_dtype
@pytest.mark.parametrize("case", FEW, ids=str)
def test_cases(emulated: Any, case: LinearCase, dtype: str) -> None:
    check(emulated, case.make(DTYPES[dtype]), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*LAID_OUT, *MORE], ids=str)
def test_layouts(emulated: Any, case: LinearCase, dtype: str) -> None:
    check(emulated, case.make(DTYPES[dtype]), dtype)


@pytest.mark.parametrize("positions", ["bitmap", "columns"])
@every_dtype
def test_views(emulated: Any, dtype: str, positions: str) -> None:
    """Strided and misplaced tensors, the packed parts too."""
    x, a, b, packed, bias = LinearCase(rows=(2, 3), positions=positions).make(DTYPES[dtype])
    dy = torch.randn(2, 3, 9).to(DTYPES[dtype])
    for view in (inside, shifted, turned):
        check(emulated, [view(x), view(a), view(b), packed, view(bias)], dtype, view(dy))
    moved = packed._replace(values=shifted(packed.values, 3))
    check(emulated, [x[:1].expand(4, 3, 13), a, b, moved, bias], dtype)


def test_every_combination_of_gradients(emulated: Any) -> None:
    arguments = LinearCase(rows=(2, 3)).make()
    x, a, b, packed, _ = arguments
    dy = torch.randn(2, 3, 9)
    expected = exact_gradients(arguments, dy)
    for bits in range(32):
        back = (dy, x, a, b, *packed[:3], bits)
        found = emulated.lowrank_sparse_linear_backward(*back)
        check_like_fake("lowrank_sparse_linear_backward", found, *back)
        for bit, (gradient, (name, exact)) in enumerate(zip(found, expected.items(), strict=True)):
            if bits >> bit & 1:
                assert relative(gradient, exact) <= 1e-5, (bits, name)
            else:
                assert gradient.shape == (0,), (bits, name)


def test_the_same_bits_twice(emulated: Any) -> None:
    arguments = LinearCase(rows=(20,), n=200, m=150, rank=7).make()
    x, a, b, packed, _ = arguments
    runs = [
        [
            call(emulated, arguments),
            *emulated.lowrank_sparse_linear_backward(torch.ones(20, 150), x, a, b, *packed[:3], 31),
        ]
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (LinearCase(rows=(33,)), torch.float32),
        (LinearCase(rows=(3, 11)), torch.bfloat16),
        (LinearCase(n=0), torch.float32),
        (LinearCase(m=0), torch.float32),
        (LinearCase(), torch.float64),
        (LinearCase(rows=(1,), n=45000, m=2, kept=0.001), torch.float32),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_goes_to_the_reference(
    emulated: Any, case: LinearCase, dtype: torch.dtype
) -> None:
    arguments = case.make(dtype)
    with pytest.raises(RuntimeError), no_reference() as called:
        call(emulated, arguments)
    assert called == ["lowrank_sparse_linear"]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    y = call(emulated, arguments)
    assert relative(y, dense_linear(*arguments)) <= tolerance
    x, a, b, packed, _ = arguments
    dy = torch.randn(y.shape).to(dtype)
    found = emulated.lowrank_sparse_linear_backward(dy, x, a, b, *packed[:3], 31)
    for gradient, exact in zip(found, exact_gradients(arguments, dy).values(), strict=True):
        assert relative(gradient, exact) <= tolerance


def test_numbers_that_are_not_sound_stop_the_launch(emulated: Any) -> None:
    for positions in ("bitmap", "columns"):
        x, a, b, packed, bias = LinearCase(positions=positions).make()
        offsets = packed.offsets.clone()
        offsets[4] = packed.values.shape[0] + 5
        with pytest.raises(RuntimeError, match="a launch failed"):
            call(emulated, [x, a, b, packed._replace(offsets=offsets), bias])
        broken = packed.positions | 16
        with pytest.raises(RuntimeError, match="a launch failed"):
            call(emulated, [x, a, b, packed._replace(positions=broken), bias])


X, A, B, PACKED, BIAS = LinearCase().make()
GIVEN = {"x": X, "a": A, "b": B, "values": PACKED[0], "bias": BIAS} | {
    "offsets": PACKED[1],
    "positions": PACKED[2],
}
REFUSALS = [
    ({"a": A[0]}, r"a must be \[m, r\] with r >= 1, got \[3\]"),
    ({"b": B[:2]}, r"b must be \[r, n\] with r = 3, got \[2, 13\]"),
    ({"b": B.half()}, "b must have a's dtype torch.float32, got torch.float16"),
    ({"x": X.bfloat16()}, "x must have a's dtype torch.float32, got torch.bfloat16"),
    ({"x": X[:, 1:]}, r"x must be .*13.*, got \[7, 12\]"),
    ({"values": PACKED[0].double()}, "values must have a's dtype torch.float32, got torch.float64"),
    ({"values": PACKED[0][None]}, r"values must be \[nnz\], got \[1, "),
    ({"offsets": PACKED[1].long()}, "offsets must be int32, got torch.int64"),
    ({"offsets": PACKED[1][1:]}, r"offsets must be .* = \[10\] with segments = 1, got \[9\]"),
    ({"positions": PACKED[2].int()}, "positions must be uint8 or int16, got torch.int32"),
    ({"positions": PACKED[2][1:]}, r"ceil\(n / 8\)\] = \[9, 2\], got \[8, 2\]"),
    ({"bias": BIAS[1:]}, r"bias must be .*9.*, got \[8\]"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSALS)
@pytest.mark.parametrize("native", ["emulated", "cpu"])
def test_refusals(
    native: str, changed: dict[str, Tensor], message: str, request: pytest.FixtureRequest
) -> None:
    """The CUDA ops and those of the CPU name what was expected and what was given."""
    ops = request.getfixturevalue("emulated") if native == "emulated" else torch.ops.tensorcomp
    given = GIVEN | changed
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        ops.lowrank_sparse_linear(*given.values())
    if "bias" not in changed:
        back = [given[name] for name in ("x", "a", "b", "values", "offsets", "positions")]
        with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
            ops.lowrank_sparse_linear_backward(torch.zeros(7, 9), *back, 31)
