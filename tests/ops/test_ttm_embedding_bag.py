"""The TTM embedding bag against torch's own on the dense table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embedding_problems import EmbeddingCase
from torch import Tensor
from torch.nn import functional as F
from tucker2_bad_calls import raised
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative

from tensorcomp_ext.ops import ttm_embedding_bag

CASES = [
    EmbeddingCase(),
    EmbeddingCase((6, 5), (3, 4), (1, 3), 1, padding=4),
    EmbeddingCase((5, 4), (2, 3), (3, 4), 2, padding=17, integers=torch.int32),
]
MODES = ("sum", "mean")
OFFSETS = {
    "plain": ([0, 3, 3, 9], False),
    "with the end": ([0, 3, 3, 9, 15], True),
    "one bag": ([0], False),
    "empty at the end": ([0, 15, 15], False),
    "an end before the last index": ([0, 4, 9], True),
}
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES)


def bag(case: EmbeddingCase, indices: Tensor, cores: Any, offsets: Tensor | None, **options: Any) -> Tensor:
    padding = None if case.padding < 0 else case.padding
    return ttm_embedding_bag(
        indices, cores, offsets, num_embeddings=case.rows, padding_idx=padding, **options
    )


def torch_bag(
    case: EmbeddingCase, indices: Tensor, table: Tensor, offsets: Tensor | None, **options: Any
) -> Tensor:
    padding = None if case.padding < 0 else case.padding
    return F.embedding_bag(indices, table, offsets, padding_idx=padding, **options)


def problem(case: EmbeddingCase, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    cores = [core.requires_grad_() for core in case.cores(dtype)]
    indices = case.but(shape=(15,)).indices()
    indices[3] = max(case.padding, 0)
    return cores, indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", OFFSETS)
@every_mode
@every_case
def test_offsets(case: EmbeddingCase, mode: str, form: str, dtype: torch.dtype) -> None:
    cores, indices = problem(case, dtype)
    places, last = OFFSETS[form]
    offsets = torch.tensor(places, dtype=case.integers)
    y = bag(case, indices, cores, offsets, mode=mode, include_last_offset=last)
    wide = [core.detach().double().requires_grad_() for core in cores]
    kept = indices[: places[-1]] if last else indices  # in float64 torch would go on behind the end
    expected = torch_bag(case, kept, case.table(wide), offsets, mode=mode, include_last_offset=last)
    assert y.dtype == dtype and relative(y.detach(), expected.detach()) <= 2 * FORWARD_TOLERANCE[dtype]
    dy = torch.randn(y.shape).to(dtype)
    found = torch.autograd.grad(y, cores, dy)
    for k, gradient in enumerate(torch.autograd.grad(expected, wide, dy.double())):
        assert relative(found[k], gradient) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_mode
def test_no_bag(mode: str, dtype: torch.dtype) -> None:
    case = CASES[1]
    cores, indices = problem(case, dtype)
    for places, last in (([], False), ([0], True)):
        offsets = torch.tensor(places, dtype=torch.int64)
        y = bag(case, indices, cores, offsets, mode=mode, include_last_offset=last)
        assert y.shape == (0, case.dim) and y.dtype == dtype
        assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), cores))


@every_mode
@every_case
def test_bags_of_one_size(case: EmbeddingCase, mode: str) -> None:
    cores = case.cores()
    for shape in ((4, 6), (1, 9), (0, 3)):
        indices = case.but(shape=shape).indices()
        y = bag(case, indices, cores, None, mode=mode)
        expected = torch_bag(case, indices, case.table([c.double() for c in cores]), None, mode=mode)
        assert y.shape == expected.shape and relative(y, expected) <= 1e-5
    # Where torch has an error for bags of no index at all.
    assert torch.equal(bag(case, indices.new_empty(5, 0), cores, None, mode=mode), torch.zeros(5, case.dim))


def test_a_bag_of_padding_alone_is_zero() -> None:
    case = CASES[1]
    cores, _ = problem(case)
    indices = torch.tensor([[4, 4, 4], [4, 1, 1]])
    for mode in MODES:
        y = bag(case, indices, cores, None, mode=mode)
        table = case.table([c.detach() for c in cores])
        assert (y[0] == 0).all() and relative(y[1].detach(), table[1] * (2 if mode == "sum" else 1)) <= 1e-5


@every_case
def test_weights(case: EmbeddingCase) -> None:
    cores, indices = problem(case)
    weights = torch.randn(15, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 11], dtype=case.integers)
    y = bag(case, indices, cores, offsets, per_sample_weights=weights)
    wide = [core.detach().double().requires_grad_() for core in cores]
    wide_weights = weights.detach().double().requires_grad_()
    expected = torch_bag(
        case, indices, case.table(wide), offsets, mode="sum", per_sample_weights=wide_weights
    )
    assert relative(y.detach(), expected.detach()) <= 1e-5
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [*cores, weights], dy)
    for gradient, its in zip(
        found, torch.autograd.grad(expected, [*wide, wide_weights], dy.double()), strict=True
    ):
        assert relative(gradient, its) <= 1e-4


@pytest.mark.parametrize("padding", [-1, 2])
@pytest.mark.parametrize("ring", [1, 2])
@every_mode
def test_float64_gradients(mode: str, ring: int, padding: int) -> None:
    case = EmbeddingCase((2, 3), (2, 2), (ring, 2), 1, padding=padding)
    cores, indices = problem(case, torch.float64)
    offsets = torch.tensor([0, 3, 3, 9])
    assert torch.autograd.gradcheck(lambda *c: bag(case, indices, c, offsets, mode=mode), cores)


@every_mode
def test_compiles_whole(mode: str) -> None:
    torch.compiler.reset()
    case = CASES[1]
    cores, indices = problem(case)
    offsets = torch.tensor([0, 4, 4, 11])
    call = torch.compile(lambda i, o: bag(case, i, cores, o, mode=mode), backend="aot_eager", fullgraph=True)
    expected = bag(case, indices, cores, offsets, mode=mode)
    y = call(indices, offsets)
    assert relative(y.detach(), expected.detach()) <= 1e-6
    for f, e in zip(*(torch.autograd.grad(r.sum(), cores) for r in (y, expected)), strict=True):
        assert relative(f, e) <= 1e-5


def test_function_transforms() -> None:
    case = CASES[1]
    cores, _ = problem(case)
    bags = case.but(shape=(3, 2, 4)).indices()
    expected = torch.stack([bag(case, i, cores, None, mode="mean") for i in bags])
    held = [core.detach() for core in cores]
    doubled = torch.func.vmap(lambda first: bag(case, bags[0], [first, held[1]], None))(
        torch.stack([held[0], 2 * held[0]])
    )
    once = bag(case, bags[0], held, None)
    assert relative(doubled, torch.stack([once, 2 * once])) <= 1e-5
    assert expected.shape == (3, 2, 12)


def test_arguments() -> None:
    case = CASES[0]
    cores, indices = problem(case)
    offsets = torch.tensor([0, 3])
    weights = torch.ones(15)

    def said(i: Any = indices, o: Any = offsets, **options: Any) -> str:
        return raised(lambda: bag(case, i, cores, o, **options))[1]

    assert "mode must be 'sum' or 'mean', got 'max'" in said(mode="max")
    assert "per_sample_weights go with mode 'sum', got 'mean'" in said(
        mode="mean", per_sample_weights=weights
    )
    assert "per_sample_weights must have the shape [15] of indices, got [3]" in said(
        per_sample_weights=weights[:3]
    )
    assert "per_sample_weights must have the cores' dtype" in said(per_sample_weights=weights.double())
    assert "offsets must be None for indices [bags, size]" in said(indices.reshape(5, 3))
    assert "indices must be [bags, size] or [n], got [5, 3, 1]" in said(indices.reshape(5, 3, 1))
    assert "offsets must be given for indices [n]" in said(o=None)
    assert "offsets must be [bags], got [1, 2]" in said(o=offsets[None])
    assert "offsets must be [bags + 1], got [0]" in said(o=offsets[:0], include_last_offset=True)
    assert "offsets must have the indices' dtype torch.int64, got torch.int32" in said(o=offsets.int())
    assert (
        "ttm_embedding_bag: num_embeddings must be in [1, 60]"
        in raised(lambda: ttm_embedding_bag(indices, cores, offsets, num_embeddings=0))[1]
    )
    for wrong in (-1, 57):
        bad = indices.clone()
        bad[4] = wrong
        with pytest.raises(
            IndexError, match=rf"ttm_embedding_bag: indices must be in \[0, 57\), got {wrong}"
        ):
            bag(case, bad, cores, offsets)


WRONG_OFFSETS = {
    "not from 0": ([1, 3], "must begin with 0, got 1"),
    "from -1": ([-1, 3], "must begin with 0, got -1"),
    "decreasing": ([0, 9, 4, 12], "must not decrease, got 9 and then 4"),
    "below 0": ([0, -2], "must not decrease, got 0 and then -2"),
    "past the end": ([0, 99], "must be at most 15, the number of indices, got 99"),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", WRONG_OFFSETS)
@every_mode
@every_case
def test_offsets_that_are_none(case: EmbeddingCase, mode: str, form: str, last: bool) -> None:
    cores, indices = problem(case)
    places, text = WRONG_OFFSETS[form]
    offsets = torch.tensor(places, dtype=case.integers)
    assert raised(lambda: bag(case, indices, cores, offsets, mode=mode, include_last_offset=last)) == (
        "ValueError",
        f"ttm_embedding_bag: offsets {text}",
    )
