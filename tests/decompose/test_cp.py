"""CP-ALS: planted ranks, degenerate tensors, agreement with tensorly, bad input."""

import itertools
import math

import pytest
import torch
from planted import kruskal, random, relative

from tensorcomp_ext import decompose
from tensorcomp_ext.decompose import cp as cp_module


def planted(sizes, rank, seed=0):
    return kruskal([random(n, rank, seed=seed + k) for k, n in enumerate(sizes)])


@pytest.mark.parametrize(
    ("sizes", "rank"),
    [((6, 7, 8), 3), ((9, 8, 3, 3), 4), ((6, 5), 3), ((2, 3, 4, 3, 2), 2), ((5, 1, 6), 2), ((7, 4, 5), 1)],
)
def test_planted_rank_is_recovered(sizes, rank):
    tensor = planted(sizes, rank)
    factors, error = decompose.cp_als(tensor, rank, sweeps=500, tol=1e-9)
    assert [tuple(f.shape) for f in factors] == [(n, rank) for n in sizes]
    assert error < 1e-5
    assert error == pytest.approx(relative(kruskal(factors), tensor), rel=1e-3, abs=1e-14)


def test_components_are_the_planted_ones():
    truth = [random(n, 3, seed=k) for k, n in enumerate((8, 9, 7))]
    factors, _ = decompose.cp_als(kruskal(truth), 3, sweeps=500, tol=1e-10)
    for found, planted_factor in zip(factors, truth, strict=True):
        cosines = (found / found.norm(dim=0)).T @ (planted_factor / planted_factor.norm(dim=0))
        assert torch.allclose(cosines.abs().max(dim=1).values, torch.ones(3, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_only_the_best_start_of_the_trial_goes_on(seed):
    tensor, sweeps, trial = random(7, 6, 5, seed=seed), 60, cp_module.TRIAL_SWEEPS
    generator = torch.Generator().manual_seed(3)
    starts = [cp_module._start(tensor, 4, generator if k else None) for k in range(4)]
    runs = [cp_module.als64(tensor, list(start), sweeps=sweeps, tol=0.0) for start in starts]
    best, errors = min(runs, key=lambda run: min(run[1][:trial]))
    found = decompose.cp_als(tensor, 4, restarts=4, sweeps=sweeps, tol=0.0, seed=3)
    assert found.relative_error == pytest.approx(min(errors), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(found.factors, best, strict=True))


def test_losing_starts_cost_the_trial_sweeps_alone(monkeypatch):
    original, calls = cp_module._Fit.sweep, []
    monkeypatch.setattr(cp_module._Fit, "sweep", lambda *a: calls.append(1) or original(*a))
    decompose.cp_als(random(7, 6, 5), 4, restarts=3, sweeps=100, tol=0.0)
    assert len(calls) == 100 + 2 * cp_module.TRIAL_SWEEPS
    calls.clear()
    decompose.cp_als(random(7, 6, 5), 4, restarts=3, sweeps=6, tol=0.0)
    assert len(calls) == 3 * 6


def test_weights_are_spread_evenly():
    factors, _ = decompose.cp_als(random(5, 6, 7), 4)
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    assert torch.allclose(norms, norms[0].expand_as(norms), rtol=1e-10)


@pytest.mark.parametrize("sizes", [(5, 6, 7), (4, 3, 2, 5)])
def test_error_falls_with_every_sweep(sizes):
    tensor = random(*sizes)
    start = cp_module._start(tensor, 3, None)
    _, errors = cp_module.als64(tensor, start, sweeps=40, tol=0.0)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("sizes", [(5, 6, 7), (4, 3, 2, 5), (5, 8)])
def test_one_update_is_the_least_squares_solution(sizes):
    tensor, rank = random(*sizes), 2
    factors, _ = cp_module.als64(tensor, cp_module._start(tensor, rank, None), sweeps=1, tol=0.0)
    design = cp_module.khatri_rao(factors[:-1])
    best = torch.linalg.lstsq(design, tensor.reshape(-1, sizes[-1])).solution
    left = float((design @ best - tensor.reshape(-1, sizes[-1])).norm())
    assert float((kruskal(factors) - tensor).norm()) == pytest.approx(left, rel=1e-7)


def test_degenerate_tensor_keeps_bounded_components():
    # Rank 3, but the limit of tensors of rank 2 whose components grow without bound and cancel.
    a, b = torch.linalg.qr(random(6, 2))[0].T
    parts = [(a, a, b), (a, b, a), (b, a, a)]
    tensor = sum(torch.einsum("i,j,k->ijk", *part) for part in parts)
    factors, error = decompose.cp_als(tensor, 2, restarts=1, sweeps=500, tol=0.0)
    norms = math.prod(factor.norm(dim=0) for factor in factors)
    assert float(norms.max()) < 3 * cp_module.LARGEST_WEIGHT * float(tensor.norm())
    assert error < 0.1


def test_rank_beyond_every_mode():
    tensor = random(3, 4, 5)
    factors, error = decompose.cp_als(tensor, 12, sweeps=500)
    assert [tuple(f.shape) for f in factors] == [(3, 12), (4, 12), (5, 12)]
    assert error < 1e-2
    with pytest.warns(UserWarning, match="cp_als: rank 13 exceeds 12; clipped to 12") as record:
        decompose.cp_als(tensor, 13, sweeps=2)
    assert record[0].filename == __file__


@pytest.mark.parametrize(("sizes", "rank"), [((6, 7, 8), 3), ((8, 9, 3, 3), 5)])
def test_no_worse_than_tensorly(sizes, rank):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import parafac

    tensor = planted(sizes, rank) + 0.3 * random(*sizes, seed=9)
    weights, factors = parafac(
        tensorly.tensor(tensor.numpy()), rank, n_iter_max=200, init="svd", tol=1e-7, random_state=0
    )
    theirs = kruskal([torch.tensor(f * (weights if k == 0 else 1.0)) for k, f in enumerate(factors)])
    assert decompose.cp_als(tensor, rank).relative_error <= relative(theirs, tensor) * (1 + 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_strides_and_seed(dtype):
    tensor = random(6, 5, 4).to(dtype)
    strided = torch.stack([tensor, tensor], dim=-1)[..., 1].requires_grad_()
    for first, second in zip(
        decompose.cp_als(tensor, 2).factors, decompose.cp_als(strided, 2).factors, strict=True
    ):
        assert first.dtype == dtype
        assert first.is_contiguous()
        assert not second.requires_grad
        assert torch.equal(first, second)


def test_zero_tensor_and_single_mode():
    factors, error = decompose.cp_als(torch.zeros(3, 4, 5), 2)
    assert error == 0.0
    assert not kruskal(factors).any()
    vector = random(6)
    assert relative(kruskal(decompose.cp_als(vector, 1).factors), vector) < 1e-14


class TestBadInput:
    def test_non_finite(self):
        tensor = random(4, 5, 6)
        tensor[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="cp_als: tensor contains NaN or Inf"):
            decompose.cp_als(tensor, 2)

    def test_numbers(self):
        tensor = random(4, 5, 6)
        with pytest.raises(ValueError, match="cp_als: rank must be at least 1, got 0"):
            decompose.cp_als(tensor, 0)
        with pytest.raises(TypeError, match="cp_als: rank must be an int"):
            decompose.cp_als(tensor, 2.0)
        for option in ({"restarts": 0}, {"sweeps": 0}):
            with pytest.raises(ValueError, match="must be at least 1, got 0"):
                decompose.cp_als(tensor, 2, **option)
        with pytest.raises(ValueError, match="tol must be finite"):
            decompose.cp_als(tensor, 2, tol=-1.0)
