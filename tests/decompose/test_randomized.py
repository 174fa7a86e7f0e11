"""Randomised SVD against LAPACK, the fall back to the exact one, bad input."""

import pytest
import torch
from planted import random, relative

from tensorcomp_ext import decompose
from tensorcomp_ext.decompose import factor_pair, randomized


def decaying(rows, columns, values, seed=0):
    """A matrix of these singular values."""
    count = min(rows, columns)
    u = torch.linalg.qr(random(rows, count, seed=seed))[0]
    v = torch.linalg.qr(random(columns, count, seed=seed + 1))[0]
    return (u * values) @ v.T


@pytest.fixture(params=["one block", "many blocks"], autouse=True)
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(randomized, "ROW_BLOCK", 700)


@pytest.mark.parametrize("shape", [(80, 130), (130, 80), (61, 61), (7, 200)])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_close_to_the_best(shape, decay):
    values = decay ** torch.arange(min(shape)).double()
    matrix = decaying(*shape, values)
    rank = min(6, min(shape) - 1)
    found = decompose.randomized_svd(matrix, rank)
    best = float(values[rank:].norm() / values.norm())
    assert relative(found.U * found.S @ found.Vh, matrix) <= best * (1 + 2e-3)
    assert found.relative_error == pytest.approx(relative(found.U * found.S @ found.Vh, matrix), rel=1e-6)
    assert torch.allclose(found.S, values[:rank], rtol=1e-2)
    eye = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(found.U.T @ found.U, eye, atol=1e-12)
    assert torch.allclose(found.Vh @ found.Vh.T, eye, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 4, 5])
def test_planted_rank_is_exact(rank):
    matrix = random(60, rank) @ random(rank, 90, seed=1)
    found = decompose.randomized_svd(matrix, rank, power_iterations=0)
    assert relative(found.U * found.S @ found.Vh, matrix) < 1e-12
    assert torch.allclose(found.S, torch.linalg.svdvals(matrix)[:rank], rtol=1e-10)


def test_more_power_iterations_come_closer():
    matrix = decaying(120, 150, 0.97 ** torch.arange(120).double())
    errors = [decompose.randomized_svd(matrix, 8, power_iterations=q).relative_error for q in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert decompose.randomized_svd(matrix, 8).change < randomized.ADAPTIVE_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_strides_and_seed(dtype):
    matrix = random(40, 50).to(dtype)
    strided = torch.stack([matrix, matrix], dim=-1)[..., 0].requires_grad_()
    first, second = decompose.randomized_svd(matrix, 3), decompose.randomized_svd(strided, 3)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
        assert not b.requires_grad


def test_zero_matrix():
    found = decompose.randomized_svd(torch.zeros(6, 9), 2)
    assert found.relative_error == 0.0
    assert not (found.U * found.S @ found.Vh).any()


class TestSVDFactors:
    def test_methods_agree(self):
        matrix = decaying(90, 140, 0.8 ** torch.arange(90).double())
        exact, fast = (decompose.svd_factors(matrix, 5, method=m) for m in ("exact", "randomized"))
        assert fast.relative_error == pytest.approx(exact.relative_error, rel=1e-3)
        assert fast.relative_error >= exact.relative_error * (1 - 1e-9)
        assert relative(fast.a @ fast.b, matrix) == pytest.approx(fast.relative_error, rel=1e-6)

    @pytest.mark.parametrize("settled", [True, False])
    def test_auto_takes_the_exact_way_where_the_tail_demands(self, settled, monkeypatch):
        matrix, calls = decaying(200, 220, 0.8 ** torch.arange(200).double()), []
        original = factor_pair.truncated_svd64
        monkeypatch.setattr(factor_pair, "truncated_svd64", lambda *a: calls.append(1) or original(*a))
        monkeypatch.setattr(factor_pair, "LARGE_SVD_WORK", 0)
        if not settled:
            monkeypatch.setattr(factor_pair, "SETTLED", -1.0)
        found = decompose.svd_factors(matrix, 5)
        assert bool(calls) != settled
        assert found.relative_error == pytest.approx(0.8**5, rel=1e-3)
        calls.clear()
        decompose.svd_factors(matrix, 150)  # a rank too large for it to pay
        assert calls

    @pytest.mark.parametrize(("tail", "above"), [("power", 1e-3), ("noise", 4e-3)])
    def test_auto_keeps_the_randomized_factors_of_a_flat_tail(self, tail, above, monkeypatch):
        if tail == "power":
            matrix = decaying(300, 400, torch.arange(1, 301).double() ** -0.5)
        else:
            matrix = random(300, 700)
        best = decompose.svd_factors(matrix, 16, method="exact").relative_error

        def refuse(*arguments):
            raise AssertionError("the exact way was taken")

        monkeypatch.setattr(factor_pair, "LARGE_SVD_WORK", 0)
        monkeypatch.setattr(factor_pair, "truncated_svd64", refuse)
        found = decompose.svd_factors(matrix, 16)
        assert best < found.relative_error <= best * (1 + above)
        assert relative(found.a @ found.b, matrix) == pytest.approx(found.relative_error, rel=1e-6)

    def test_unknown_method(self):
        with pytest.raises(ValueError, match="method must be 'auto', 'exact' or 'randomized', got 'fast'"):
            decompose.svd_factors(random(4, 5), 2, method="fast")


def test_bad_input():
    matrix = random(5, 6)
    with pytest.raises(ValueError, match=r"must not be negative, got -1 and None"):
        decompose.randomized_svd(matrix, 2, oversampling=-1)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        decompose.randomized_svd(matrix, 0)
    with pytest.warns(UserWarning, match="randomized_svd: rank 9 exceeds 5; clipped to 5"):
        assert decompose.randomized_svd(matrix, 9).S.shape == (5,)
    matrix[0, 0] = float("nan")
    with pytest.raises(ValueError, match="randomized_svd: matrix contains NaN or Inf"):
        decompose.randomized_svd(matrix, 2)
