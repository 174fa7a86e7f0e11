"""The embedding of the emulated CUDA ops against the float64 oracle: modes, rings, padding, layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from embedding_problems import CORE_LAYOUTS, EMBEDDING_CASES, EmbeddingCase
from emulated_problems import check_like_fake, inside, no_reference, turned
from torch import Tensor
from tucker2_problems import relative

from tensorcomp_ext import reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
BASE = EmbeddingCase()


def padding_of(case: EmbeddingCase) -> int | None:
    return None if case.padding < 0 else case.padding


def oracle(case: EmbeddingCase, indices: Tensor, cores: Sequence[Tensor]) -> Tensor:
    return reference.ttm_embedding(indices, [c.double() for c in cores], case.rows, padding_of(case))


def oracle_gradients(
    case: EmbeddingCase, indices: Tensor, cores: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    exact = [c.detach().double().requires_grad_() for c in cores]
    y = reference.ttm_embedding(indices, exact, case.rows, padding_of(case))
    return list(torch.autograd.grad(y, exact, grad.double()))


def check(ops: Any, case: EmbeddingCase, indices: Tensor, cores: list[Tensor], grad: Tensor) -> None:
    """Rows and every gradient, from the kernels alone."""
    dtype = cores[0].dtype
    mask = (1 << len(cores)) - 1
    with no_reference():
        y = ops.ttm_embedding(indices, cores, case.rows, case.padding)
        found = ops.ttm_embedding_backward(grad, indices, cores, case.rows, case.padding, mask)
    check_like_fake("ttm_embedding", y, indices, cores, case.rows, case.padding)
    assert y.dtype == dtype
    assert relative(y, oracle(case, indices, cores)) <= TOLERANCE[dtype]
    expected = oracle_gradients(case, indices, cores, grad)
    for k, (gradient, wanted) in enumerate(zip(found, expected, strict=True)):
        assert gradient.dtype == dtype and gradient.is_contiguous(), k
        assert relative(gradient, wanted) <= TOLERANCE[dtype], k


def made(case: EmbeddingCase, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    return case.indices(), case.cores(dtype), torch.randn(*case.shape, case.dim).to(dtype)


@dtypes
@pytest.mark.parametrize("case", EMBEDDING_CASES, ids=str)
def test_cases(emulated: Any, case: EmbeddingCase, dtype: torch.dtype) -> None:
    check(emulated, case, *made(case, dtype))


@dtypes
@pytest.mark.parametrize("layout", CORE_LAYOUTS)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
def test_layouts(emulated: Any, integers: torch.dtype, layout: str, dtype: torch.dtype) -> None:
    case = BASE.but(layout=layout, integers=integers, padding=2, ranks=(3, 2, 4))
    indices, cores, grad = made(case, dtype)
    check(emulated, case, indices.t().contiguous().t(), cores, turned(grad))
    check(emulated, case, indices, cores, inside(grad))


def test_every_index_the_same_and_every_one_different(emulated: Any) -> None:
    """One slice takes all rows; each slice takes some."""
    for case in (BASE.but(shape=(300,)), BASE.but(shape=(300,), ranks=(2, 3, 4))):
        _, cores, grad = made(case, torch.float32)
        check(emulated, case, torch.full((300,), 17), cores, grad)
        check(emulated, case, torch.arange(300) % case.rows, cores, grad)
        check(emulated, case, (torch.arange(300) > 150) * 20, cores, grad)


def test_padding_alone(emulated: Any) -> None:
    case = BASE.but(padding=4)
    indices, cores, grad = torch.full((5,), 4), case.cores(), torch.full((5, case.dim), float("inf"))
    assert not emulated.ttm_embedding(indices, cores, case.rows, 4).any()
    for gradient in emulated.ttm_embedding_backward(grad, indices, cores, case.rows, 4, 7):
        assert not gradient.any()


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()], ids=str)
def test_shapes(emulated: Any, shape: tuple[int, ...]) -> None:
    case = BASE.but(shape=shape)
    check(emulated, case, torch.zeros(shape, dtype=torch.int64) + 5, *made(case, torch.float32)[1:])


def test_every_mask(emulated: Any) -> None:
    indices, cores, grad = made(BASE, torch.float32)
    expected = oracle_gradients(BASE, indices, cores, grad)
    for mask in range(8):
        arguments = (grad, indices, cores, BASE.rows, -1, mask)
        found = emulated.ttm_embedding_backward(*arguments)
        check_like_fake("ttm_embedding_backward", tuple(found), *arguments)
        for k, (gradient, wanted) in enumerate(zip(found, expected, strict=True)):
            assert gradient.shape == (0,) if not mask >> k & 1 else relative(gradient, wanted) <= 1e-5, (
                mask,
                k,
            )


def test_the_same_bits_twice(emulated: Any) -> None:
    case = BASE.but(shape=(500,))
    indices, cores, grad = made(case, torch.float32)
    first, again = (emulated.ttm_embedding_backward(grad, indices, cores, case.rows, -1, 7) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


@pytest.mark.parametrize("wrong", [-1, BASE.rows, 2**40])
def test_an_index_out_of_range_fails(emulated: Any, wrong: int) -> None:
    indices, cores, grad = made(BASE, torch.float32)
    indices[3, 1] = wrong
    with pytest.raises(RuntimeError, match="a launch failed"):
        emulated.ttm_embedding(indices, cores, BASE.rows)
    with pytest.raises(RuntimeError, match="a launch failed"):
        emulated.ttm_embedding_backward(grad, indices, cores, BASE.rows, -1, 7)


def test_what_does_not_fit_goes_to_the_reference(emulated: Any) -> None:
    wide = EmbeddingCase(vocab=(3, 2), dims=(256, 256), ranks=(1, 300), missing=0, shape=(2,))
    nine = EmbeddingCase(vocab=(2,) * 9, dims=(1,) * 9, ranks=(1,) * 9, missing=0, shape=(4,))
    sizes = [size for core in wide.cores() for size in core.shape]
    assert not torch.ops.tensorcomp.cuda_fits_embedding(sizes, 163 * 1024)
    assert not torch.ops.tensorcomp.cuda_fits_embedding([1, 2, 1, 1] * 9, 163 * 1024)
    for case, dtype in ((wide, torch.float32), (nine, torch.float32), (BASE, torch.float64)):
        indices, cores, grad = made(case, dtype)
        y = emulated.ttm_embedding(indices, cores, case.rows)
        assert relative(y, oracle(case, indices, cores)) <= 1e-5
        mask = (1 << len(cores)) - 1
        found = emulated.ttm_embedding_backward(grad, indices, cores, case.rows, -1, mask)
        for gradient, wanted in zip(found, oracle_gradients(case, indices, cores, grad), strict=True):
            assert relative(gradient, wanted) <= 1e-4


def test_refusals(emulated: Any) -> None:
    indices, (first, second, third), grad = made(BASE, torch.float32)
    for cores, rows, message in (
        ([first, second], BASE.rows, r"cores\[0\] must be .* with r = 5"),
        ([first, third, second], BASE.rows, r"cores\[0\] must be .* r = 5"),
        ([first, second.half(), third], BASE.rows, "one dtype"),
        ([first[0], second, third], BASE.rows, r"cores\[0\] must be"),
        ([first, second, third], 61, "at most the product of all vocab_k, got 61"),
        ([first, second, third], 0, "at least 1"),
        ([], BASE.rows, "cores must hold at least one"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.ttm_embedding(indices, cores, rows)
    with pytest.raises(RuntimeError, match="indices must be int64 or int32"):
        emulated.ttm_embedding(indices.short(), [first, second, third], BASE.rows)
    with pytest.raises(RuntimeError, match="grad must have the shape"):
        emulated.ttm_embedding_backward(grad[..., 1:], indices, [first, second, third], BASE.rows, -1, 7)
