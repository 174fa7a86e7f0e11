"""Weights with a sparse part, in training: entries, exact starts, gradients, masks, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sparse_cases import CASES, MATRIX, every_case, every_mode, expected, low_rank_of, made, sparse_of

from tensorcomp_ext.formats import SVD, LowRankSparse, PackedLowRankSparse, get_format
from tensorcomp_ext.formats.lowrank_sparse import largest
from tensorcomp_ext.ops import pack_mask, unpack_mask


@every_case
@every_mode
def test_entries(case: Any, mode: str) -> None:
    weight = made(case, mode)
    torch.testing.assert_close(weight.to_dense().detach(), expected(weight), rtol=0, atol=1e-13)
    assert 0 < weight.nnz < math.prod(weight.shape) and weight.nnz == int(weight.kept.sum())


@every_case
@every_mode
def test_without_a_cut_the_weight_is_the_same(case: Any, mode: str) -> None:
    weight = made(case, mode)
    cut = weight.to_dense()
    weight._cut = None
    torch.testing.assert_close(cut, weight.to_dense(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["svd", "cp", "tucker", "tt", "tr"])
def test_products_of_two_matrices_are_found(name: str) -> None:
    shape, options = (15, 14), {} if name == "svd" else MATRIX
    weight = LowRankSparse.random(shape, 2, low_rank=name, **options)
    pair = weight.factor_pair()
    assert pair is not None and weight._cut.rank == pair.a.shape[1]
    torch.testing.assert_close((pair.a @ pair.b).detach(), weight.low_rank.to_dense().detach())
    assert LowRankSparse.random(shape, 2, low_rank="ttm").factor_pair() is None


@pytest.mark.parametrize("name,rank", [("tucker2", (4, 2)), ("tucker", 3), ("cp", 5), ("tt", 3), ("tr", 2)])
@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 1, 3)])
def test_kernels_are_cut_at_the_output_channels(name: str, rank: Any, kernel: tuple[int, ...]) -> None:
    weight = LowRankSparse.random((9, 5, *kernel), rank, low_rank=name, dtype=torch.float64)
    pair = weight.factor_pair()
    assert pair is not None and pair.a.shape[0] == 9
    low = weight.low_rank.to_dense()
    torch.testing.assert_close((pair.a @ pair.b).reshape(low.shape), low, rtol=0, atol=1e-13)


def test_a_product_of_too_large_a_rank_is_not_taken() -> None:
    """A Tucker weight is far cheaper factor by factor than cut at the product of its ranks."""
    big = LowRankSparse.empty((1024, 1024), 24, low_rank="tucker", device="meta")
    small = LowRankSparse.empty((1024, 1024), 4, low_rank="tucker", device="meta")
    assert big._cut is None and small._cut is not None
    assert big.rebuild_macs() == big.low_rank.rebuild_macs() < 24 * 24 * 1024 * 1024


# --- starts ------------------------------------------------------------------------------------------------


@every_case
@every_mode
def test_starts_are_exact(case: Any, mode: str) -> None:
    name, shape, rank, options = case
    dense = torch.randn(shape)
    weight = LowRankSparse.from_dense(dense, rank, low_rank=name, mode=mode, **options)
    assert (weight.to_dense() - dense).norm() < 1e-6 * dense.norm()
    assert weight.nnz == dense.numel()
    if mode == "masking":
        assert torch.equal(sparse_of(weight), dense) and torch.equal(weight.to_dense(), dense)


@every_case
@every_mode
def test_without_a_sparse_part_the_low_rank_one_is_left(case: Any, mode: str) -> None:
    weight = made(case, mode, share=0.0)
    assert weight.nnz == 0
    torch.testing.assert_close(weight.to_dense().detach(), low_rank_of(weight), rtol=0, atol=1e-13)


@every_mode
@pytest.mark.parametrize("name,rank", [("tt", 3), ("cp", 2), ("tucker2", (3, 2)), ("svd", 3)])
def test_masking_initialisation_finds_what_lies_under_spikes(name: str, rank: Any, mode: str) -> None:
    torch.manual_seed(3)
    shape = (8, 9, 3, 3)
    low = LowRankSparse.random(shape, rank, low_rank=name, dtype=torch.float64)
    planted = low_rank_of(low)
    spikes = torch.rand(shape) < 0.05
    dense = torch.where(spikes, planted + 10 * planted.abs().max(), planted)
    share = float(spikes.double().mean())
    options: dict[str, Any] = {"low_rank": name, "mode": mode, "outliers": share, "iterations": 400}
    found = LowRankSparse.from_dense(dense, rank, init="masking", **options)
    residual = LowRankSparse.from_dense(dense, rank, init="residual", **options)
    assert (low_rank_of(found) - planted).norm() < 1e-6 * planted.norm()
    assert (low_rank_of(residual) - planted).norm() > 0.1 * planted.norm()
    for weight in (found, residual):
        assert (weight.to_dense() - dense).norm() < 1e-12 * dense.norm()
    if mode == "additive":
        assert (sparse_of(found)[~spikes]).norm() < 1e-6 * planted.norm()


def test_largest_takes_the_first_of_equals() -> None:
    found = largest(torch.tensor([[1.0, -3.0, 2.0], [-2.0, 2.0, 0.0]]), 3)
    assert found.tolist() == [[False, True, True], [True, False, False]]


# --- training ----------------------------------------------------------------------------------------------


@every_case
@every_mode
def test_gradients(case: Any, mode: str) -> None:
    weight = made(case, mode)
    gradient = torch.randn(weight.shape, dtype=torch.float64)
    kept = weight.kept
    found = torch.autograd.grad(weight.to_dense(), weight.factors, gradient)
    assert torch.equal(found[-1].reshape(weight.shape), torch.where(kept, gradient, 0))
    if weight.low_rank is None:
        return
    reaching = torch.where(kept, 0, gradient) if mode == "masking" else gradient
    low = weight.low_rank.to_dense().reshape(weight.shape)
    for f, e in zip(found, torch.autograd.grad(low, weight.low_rank.factors, reaching), strict=False):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


@every_mode
def test_hidden_entries_may_be_anything(mode: str) -> None:
    weight = made(CASES[0], mode)
    before = weight.to_dense().detach()
    with torch.no_grad():
        weight.sparse.view(weight.shape)[~weight.kept] = float("nan")
    assert torch.equal(weight.to_dense(), before)
    weight.to_dense().sum().backward()
    assert all(torch.isfinite(factor.grad).all() for factor in weight.factors)


def test_masks_take_one_bit_an_entry() -> None:
    weight = made(CASES[1])
    kept = torch.rand(weight.shape) < 0.5
    weight.keep(kept)
    assert weight.mask.dtype == torch.uint8 and tuple(weight.mask.shape) == (9, 6)
    assert torch.equal(weight.mask, pack_mask(kept.reshape(9, 45))) and torch.equal(weight.kept, kept)
    assert torch.equal(unpack_mask(weight.mask, 45), kept.reshape(9, 45))
    state = weight.state_dict()
    other = made(CASES[1], share=0.9)
    other.load_state_dict(state)
    assert torch.equal(other.kept, kept)
    assert weight.bfloat16().mask.dtype == torch.uint8 and torch.equal(weight.kept, kept)


def test_memory_formats_leave_the_sparse_part_alone() -> None:
    weight = made(("tucker2", (9, 5, 3, 3), (4, 2), {}))
    before = weight.to_dense()
    weight.to(memory_format=torch.channels_last)
    assert weight.sparse.is_contiguous() and torch.equal(weight.to_dense(), before)


def test_counts() -> None:
    weight = made(("svd", (40, 30), 3, {}), dtype=torch.float32)
    assert weight.numel == 3 * 70 + 1200 and weight.counted == 210 + weight.nnz
    packed = weight.finalized()
    assert packed.numel == packed.counted == weight.counted
    stored = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert packed.stored_bytes == weight.stored_bytes == stored
    assert weight.macs(7, 7) == packed.macs(7, 7) == 7 * (210 + weight.nnz)
    kernel = made(("tucker2", (9, 5, 3, 3), (4, 2), {}))
    assert kernel.macs(11, 6) == 11 * 10 + 6 * (72 + 36) + 6 * kernel.nnz
    flat = made(("svd", (9, 5, 3, 3), 4, {}))
    assert flat.macs(11, 6) == 6 * 4 * (9 + 45) + 6 * flat.nnz


def test_random_variance() -> None:
    for mode, name in (("additive", "tt"), ("masking", "tt"), ("additive", "none")):
        shape, rank = (40, 30, 3, 3), () if name == "none" else 12
        drawn = [
            LowRankSparse.random(shape, rank, 0.5, low_rank=name, mode=mode).to_dense().detach()
            for _ in range(4)
        ]
        assert torch.stack(drawn).var().item() == pytest.approx(0.5, rel=0.1)
    packed = [PackedLowRankSparse.random((60, 50), 6, 0.5).to_dense().detach() for _ in range(8)]
    assert torch.stack(packed).var().item() == pytest.approx(0.5, rel=0.15)


# --- refusals ----------------------------------------------------------------------------------------------


def test_misfit_parts_are_named() -> None:
    low = SVD.random((6, 5), 2)
    with pytest.raises(ValueError, match=r"low_rank must have the shape \[6, 4\], got \[6, 5\]"):
        LowRankSparse(low, torch.randn(6, 4))
    with pytest.raises(ValueError, match=r"sparse must be \[6, 5\], got \[6, 4\]"):
        LowRankSparse(low, torch.randn(6, 4), shape=(6, 5))
    with pytest.raises(TypeError, match=r"low_rank's dtype torch\.float32, got torch\.float64"):
        LowRankSparse(low, torch.randn(6, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mask must be \[6, 5\], got \[5, 6\]"):
        LowRankSparse(low, torch.randn(6, 5), torch.ones(5, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch\.float32"):
        LowRankSparse(low, torch.randn(6, 5), torch.ones(6, 5))
    with pytest.raises(ValueError, match="mode must be 'additive' or 'masking', got 'sum'"):
        LowRankSparse(low, torch.randn(6, 5), mode="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no sparse part itself, got 'lowrank_sparse'"):
        LowRankSparse(LowRankSparse(low, torch.randn(6, 5)), torch.randn(6, 5))
    with pytest.raises(TypeError, match="sparse must be a tensor, got list"):
        LowRankSparse(None, [1.0])  # type: ignore[arg-type]


def test_misfit_options_are_named() -> None:
    dense = torch.randn(6, 5)
    cls = get_format("lowrank_sparse")
    with pytest.raises(
        ValueError, match=r"low_rank must be a format .* for linear layers, cp, .*svd.*, tt.* or none, got"
    ):
        cls.from_dense(dense, 2, low_rank="tucker2")
    with pytest.raises(ValueError, match="low_rank must be a format without a sparse part"):
        cls.from_dense(dense, 2, low_rank="lowrank_sparse")
    with pytest.raises(ValueError, match=r"rank must be \(\) without a low-rank part, got 2"):
        cls.from_dense(dense, 2, low_rank="none")
    with pytest.raises(TypeError, match="takes no option 'in_modes' without a low-rank part"):
        cls.from_dense(dense, (), low_rank="none", in_modes=(5,))
    with pytest.raises(TypeError, match="takes no option 'in_modes'"):
        cls.from_dense(dense, 2, in_modes=(5,))
    with pytest.raises(ValueError, match="init must be 'residual' or 'masking', got 'zero'"):
        cls.from_dense(dense, 2, init="zero")
    with pytest.raises(ValueError, match=r"outliers must be in \(0, 1\), got 1.0"):
        cls.from_dense(dense, 2, init="masking", outliers=1.0)
    with pytest.raises(ValueError, match="tr: there is no fit of the observed entries"):
        cls.from_dense(dense, 2, low_rank="tr", init="masking")
    with pytest.raises(TypeError, match="takes no option 'mode'"):
        PackedLowRankSparse.from_dense(dense, 2, mode="masking")
    dense[1, 1] = float("inf")
    for name in ("svd", "none"):
        with pytest.raises(ValueError, match="weight must be finite"):
            cls.from_dense(dense, () if name == "none" else 2, low_rank=name)
