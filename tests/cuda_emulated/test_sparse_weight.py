"""The emulated CUDA ops of the low-rank + sparse weight against the formula: modes, masks, layouts."""

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
from lowrank_sparse_problems import EVERY_WEIGHT, LAYOUTS, WeightCase, dense_weight
from torch import Tensor
from tucker2_problems import relative

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_mode = pytest.mark.parametrize("mode", ["additive", "masking"])
NOT_EMPTY = [case for case in EVERY_WEIGHT if case.m and case.n]
LAID_OUT = [c.but(layout=layout) for layout in LAYOUTS[1:] for c in NOT_EMPTY[::5]]
TILES = [
    WeightCase(m=150, n=200, rank=70, layout=layout, bits=bits)
    for layout in ("contiguous", "slice", "turned")
    for bits in (False, True)
]


def exact_gradients(tensors: list[Tensor], mode: str, dw: Tensor) -> tuple[Tensor, ...]:
    exact = [t.double().requires_grad_() for t in tensors[:3]]
    return torch.autograd.grad(dense_weight(*exact, tensors[3], mode), exact, dw.double())


def check(ops: Any, tensors: list[Tensor], mode: str, dtype: str, dw: Tensor | None = None) -> None:
    """W and every gradient, from the kernels alone."""
    a, b, values, mask = tensors
    masking, tf32 = mode == "masking", dtype == "tf32"
    dw = torch.randn(values.shape).to(values.dtype) if dw is None else dw
    with no_reference():
        w = ops.lowrank_sparse_weight(a, b, values, mask, masking, tf32)
        found = ops.lowrank_sparse_weight_backward(dw, a, b, mask, masking, 7, tf32)
    assert w.dtype == values.dtype
    assert relative(w, dense_weight(*tensors, mode)) <= FORWARD_TOLERANCE[dtype]
    check_like_fake("lowrank_sparse_weight", w, a, b, values, mask, masking)
    check_like_fake("lowrank_sparse_weight_backward", found, dw, a, b, mask, masking, 7)
    for name, gradient, exact in zip("ABS", found, exact_gradients(tensors, mode, dw), strict=True):
        assert relative(gradient, exact) <= GRADIENT_TOLERANCE[dtype], name


@every_dtype
@every_mode
@pytest.mark.parametrize("case", NOT_EMPTY, ids=str)
def test_cases(emulated: Any, case: WeightCase, mode: str, dtype: str) -> None:
    check(emulated, case.make(DTYPES[dtype]), mode, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*LAID_OUT, *TILES], ids=str)
def test_layouts(emulated: Any, case: WeightCase, dtype: str) -> None:
    """Masking: its gradients too are by our kernels."""
    check(emulated, case.make(DTYPES[dtype]), "masking", dtype)


@every_mode
def test_views(emulated: Any, mode: str) -> None:
    """Views that no wide copy can read, of factors, values and the gradient."""
    for dtype in ("float32", "bfloat16"):
        *tensors, mask = WeightCase(m=20, n=48, rank=16).make(DTYPES[dtype])
        dw = torch.randn(20, 48).to(DTYPES[dtype])
        for view in (inside, shifted, turned, lambda t: t):
            check(emulated, [*map(view, tensors), mask], mode, dtype, view(dw))
        check(emulated, [*tensors, mask[:1].expand(20, 48)], mode, dtype, dw[0, 0].expand(20, 48))


@every_mode
def test_every_combination_of_gradients(emulated: Any, mode: str) -> None:
    tensors = WeightCase(m=20, n=37).make()
    a, b, _, mask = tensors
    dw = torch.randn(20, 37)
    expected = exact_gradients(tensors, mode, dw)
    for bits in range(8):
        arguments = (dw, a, b, mask, mode == "masking", bits)
        found = emulated.lowrank_sparse_weight_backward(*arguments)
        check_like_fake("lowrank_sparse_weight_backward", found, *arguments)
        for bit, (gradient, exact) in enumerate(zip(found, expected, strict=True)):
            if bits >> bit & 1:
                assert relative(gradient, exact) <= 1e-5
            else:
                assert gradient.shape == (0,)


def test_what_is_hidden_is_not_looked_at(emulated: Any) -> None:
    a, b, values, mask = WeightCase(m=30, n=50).make()
    for masking in (False, True):
        clean = emulated.lowrank_sparse_weight(a, b, values, mask, masking)
        spoiled = emulated.lowrank_sparse_weight(a, b, torch.where(mask, values, torch.nan), mask, masking)
        assert torch.equal(clean, spoiled)


def test_the_same_bits_twice(emulated: Any) -> None:
    a, b, values, mask = WeightCase(m=140, n=600, rank=20).make()
    runs = [
        [
            emulated.lowrank_sparse_weight(a, b, values, mask, True),
            *emulated.lowrank_sparse_weight_backward(values, a, b, mask, True, 7),
        ]
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


def test_what_the_kernels_do_not_take_goes_to_the_reference(emulated: Any) -> None:
    for case, dtype in (
        (WeightCase(m=0), torch.float32),
        (WeightCase(n=0), torch.float32),
        (WeightCase(), torch.float64),
    ):
        tensors = case.make(dtype)
        for mode in ("additive", "masking"):
            w = emulated.lowrank_sparse_weight(*tensors, mode == "masking")
            assert relative(w, dense_weight(*tensors, mode)) <= 1e-6
            dw = torch.randn(w.shape).to(dtype)
            a, b, _, mask = tensors
            found = emulated.lowrank_sparse_weight_backward(dw, a, b, mask, mode == "masking", 7)
            for gradient, exact in zip(found, exact_gradients(tensors, mode, dw), strict=True):
                assert relative(gradient, exact) <= 1e-6


REFUSALS = [
    ({"a": torch.zeros(3)}, r"a must be \[m, r\], got \[3\]"),
    ({"b": torch.zeros(2, 13)}, r"b must be \[r, n\] with r = 3, got \[2, 13\]"),
    ({"b": torch.zeros(3, 13).half()}, "b must have a's dtype torch.float32, got torch.float16"),
    ({"values": torch.zeros(9, 12)}, r"values must be \[m, n\] = \[9, 13\], got \[9, 12\]"),
    ({"values": torch.zeros(9, 13).double()}, "values must have a's dtype torch.float32, got torch.float64"),
    ({"mask": torch.zeros(9, 13, dtype=torch.int32)}, "mask must be bool, or uint8 .* got torch.int32"),
    (
        {"mask": torch.zeros(8, 13, dtype=torch.bool)},
        r"dtype bool must be \[m, n\] = \[9, 13\], got \[8, 13\]",
    ),
    ({"mask": torch.zeros(9, 1, dtype=torch.uint8)}, r"ceil\(n / 8\)\] = \[9, 2\], got \[9, 1\]"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSALS)
@pytest.mark.parametrize("native", ["emulated", "cpu"])
def test_refusals(
    native: str, changed: dict[str, Tensor], message: str, request: pytest.FixtureRequest
) -> None:
    """In the same words by the CUDA ops and by those of the CPU."""
    ops = request.getfixturevalue("emulated") if native == "emulated" else torch.ops.tensorcomp
    given = dict(zip(("a", "b", "values", "mask"), WeightCase().make(), strict=True)) | changed
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        ops.lowrank_sparse_weight(*given.values(), False)
    with pytest.raises(
        (RuntimeError, ValueError, TypeError), match=message.replace("values must", "grad must")
    ):
        ops.lowrank_sparse_weight_backward(given["values"], given["a"], given["b"], given["mask"], True, 7)
