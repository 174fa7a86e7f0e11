"""TR-SVD, TR-ALS and TR-matrix: exactness, planted ranks, monotone error, tensorly, bad input."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from planted import matrix_ring, random, random_ring, relative, ring

from tensorcomp_ext import decompose
from tensorcomp_ext.decompose import ring_als, solve
from tensorcomp_ext.decompose.chain_ranks import largest_ring_rank
from tensorcomp_ext.decompose.tensor_ring import _random_cores


def start(sizes, ranks, seed=5):
    return _random_cores(sizes, ranks, 1.0, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [((6, 5, 4), (2, 3, 8)), ((4, 9), (2, 2)), ((12, 3, 2, 4), (3, 4, 12, 12)), ((5, 6), (1, 5))],
)
def test_tr_svd_is_exact_at_full_rank(sizes, ranks):
    tensor = random(*sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cores, error = decompose.tr_svd(tensor, ranks)
    assert relative(ring(cores), tensor) < 1e-12
    assert error < 1e-12


def test_tr_svd_with_one_open_bond_is_tt_svd():
    tensor = random(5, 4, 6, 3)
    closed = decompose.tr_svd(tensor, (1, 3, 4, 2))
    open_ = decompose.tt_svd(tensor, (3, 4, 2))
    assert relative(ring(closed.cores), ring(open_.cores)) < 1e-12
    assert closed.relative_error == pytest.approx(open_.relative_error, rel=1e-10)


def test_tr_svd_error_is_within_the_tails_of_its_sweep():
    tensor = random(6, 5, 4, 3)
    cores, error = decompose.tr_svd(tensor, (2, 3, 4, 5))
    first = torch.linalg.svdvals(tensor.reshape(6, -1)) ** 2
    assert first[6:].sum() == 0.0  # R_0 R_1 = n_1: nothing is lost at the first step
    rest = decompose.unfold(tensor, 0)
    assert error == pytest.approx(relative(ring(cores), tensor), rel=1e-9)
    assert error < 1.0
    assert rest.shape == (6, 60)


@pytest.mark.parametrize(
    ("sizes", "ranks", "found"),
    [
        ((6, 7, 8), 2, 4),
        ((4, 5, 6, 3), 2, 4),
        ((4, 5, 6, 3), 3, 3),
        ((5, 6), 2, 4),
        ((4, 1, 6, 3), 2, 4),
        ((4, 4, 4, 9, 4, 4, 4), 4, 4),
        ((4, 4, 4, 4, 4), 3, 4),
        ((5, 6, 7), (2, 3, 2), 3),
        ((8, 8, 8), 3, 3),
        ((4, 4, 4, 4), 3, 2),  # ranks near the modes: local minima remain
    ],
)
def test_tr_als_recovers_planted_ranks(sizes, ranks, found):
    """From the default starts, at least this many of four planted rings."""
    full = decompose.ring_ranks(sizes, ranks)
    errors = [
        decompose.tr_als(random_ring(sizes, full, seed=seed), ranks, sweeps=300, tol=1e-10).relative_error
        for seed in (40, 50, 60, 70)
    ]
    assert sum(error < 1e-6 for error in errors) >= found, errors


def test_ranks_above_small_modes_are_fitted_closely_where_they_are_not_found():
    sizes, ranks = (3, 4, 2, 5), (3, 2, 2, 3)
    for seed in (40, 50, 60):
        assert decompose.tr_als(random_ring(sizes, ranks, seed=seed), ranks).relative_error < 0.2


@pytest.mark.parametrize("restarts", [1, 3])
def test_only_the_best_start_of_the_trial_goes_on(restarts):
    sizes, ranks, sweeps = (5, 6, 7), (2, 3, 2), 60
    tensor = random(*sizes)
    starts = [start(sizes, ranks, seed) for seed in range(restarts)]

    def warmed(cores):
        for ridge in ring_als.FALLING_RIDGES:
            cores = ring_als.ring_als64(tensor, cores, ridge=ridge, sweeps=1, tol=0.0).cores
        return cores

    left = sweeps - len(ring_als.FALLING_RIDGES)
    alone = [ring_als.ring_als64(tensor, warmed(c), ridge=0.0, sweeps=left, tol=0.0) for c in starts]
    best = min(alone, key=lambda fit: fit.relative_errors[ring_als.TRIAL_SWEEPS - 1])
    together = ring_als.best_start64(tensor, [], starts, ridge=0.0, sweeps=sweeps, tol=0.0)
    assert together.relative_errors == pytest.approx(best.relative_errors, rel=1e-9)
    assert len(together.relative_errors) == left


@pytest.mark.parametrize("sweeps", [1, 2, 9, 15, 17, 18])
def test_short_runs_keep_to_their_sweeps(sweeps, monkeypatch):
    original, calls = ring_als._update, []
    monkeypatch.setattr(ring_als, "_update", lambda *a: calls.append(1) or original(*a))
    fit = decompose.tr_als(random(5, 6, 7), 2, sweeps=sweeps, tol=0.0, restarts=1)
    assert len(calls) == 3 * sweeps
    assert fit.relative_error < 1.0


@pytest.mark.parametrize(
    ("sizes", "ranks"), [((6, 7, 8), (2, 3, 4)), ((3, 4, 2, 5), (3, 2, 2, 3)), ((5, 8), (2, 2))]
)
@pytest.mark.parametrize("noise", [0.0, 0.3, 100.0])
def test_als_never_gets_worse(sizes, ranks, noise):
    tensor = random_ring(sizes, ranks)
    tensor = tensor + noise * tensor.norm() / tensor.numel() ** 0.5 * random(*sizes, seed=8)
    fit = ring_als.ring_als64(tensor, start(sizes, ranks), ridge=0.0, sweeps=40, tol=0.0)
    assert all(
        later <= earlier * (1 + 1e-9) + 1e-13 for earlier, later in itertools.pairwise(fit.relative_errors)
    )
    assert fit.relative_errors[-1] == pytest.approx(relative(ring(fit.cores), tensor), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("sizes", [(6, 7, 8), (4, 3, 5, 4), (4, 1, 6, 3), (9, 4)])
def test_one_update_is_the_least_squares_solution(sizes):
    ranks = [2, 3, 2, 4][: len(sizes)]
    tensor, cores = random(*sizes), start(sizes, ranks)
    swept = ring_als.ring_als64(tensor, cores, ridge=0.0, sweeps=1, tol=0.0).cores
    # The last core was solved last, against the others as they are now.
    others = [core.reshape(-1) for core in torch.eye(swept[-1].numel(), dtype=torch.float64)]
    design = torch.stack(
        [ring([*swept[:-1], unit.reshape(swept[-1].shape)]).reshape(-1) for unit in others], 1
    )
    best = torch.linalg.lstsq(design, tensor.reshape(-1, 1), driver="gelsd").solution
    left = float((design @ best - tensor.reshape(-1, 1)).norm())
    assert float((ring(swept) - tensor).norm()) == pytest.approx(left, rel=1e-10)


@pytest.mark.parametrize("way", ["qr", "eigenvalues"])
def test_ill_conditioned_equations_are_solved_another_way(way, monkeypatch):
    monkeypatch.setattr(solve, "_cholesky", lambda gram, rhs: None)
    if way == "eigenvalues":
        monkeypatch.setattr(solve, "DESIGN_WORK", 0)
    sizes, ranks = (6, 7, 4, 5), (2, 3, 2, 2)
    tensor = random_ring(sizes, ranks)
    errors = ring_als.ring_als64(tensor, start(sizes, ranks), ridge=0.0, sweeps=60, tol=1e-12).relative_errors
    monkeypatch.undo()
    normal = ring_als.ring_als64(tensor, start(sizes, ranks), ridge=0.0, sweeps=60, tol=1e-12).relative_errors
    assert errors[:5] == pytest.approx(normal[:5], rel=1e-6)


def test_a_rank_without_use_breaks_nothing():
    tensor = random_ring((5, 6, 7), (1, 2, 2))
    result = decompose.tr_als(tensor, (3, 2, 4), sweeps=50)
    assert result.relative_error < 1e-2
    assert all(torch.isfinite(core).all() for core in result.cores)


def test_ridge_bounds_the_cores():
    tensor = random(4, 5, 6)
    plain = decompose.tr_als(tensor, 3, sweeps=30)
    ridged = decompose.tr_als(tensor, 3, sweeps=30, ridge=1e-2)
    assert max(float(c.norm()) for c in ridged.cores) < max(float(c.norm()) for c in plain.cores)


class TestTensorRing:
    def test_svd_where_a_mode_is_large_enough_else_least_squares(self):
        tensor = random(3, 12, 4, 5)
        svd = decompose.tensor_ring(tensor, 3, method="svd")  # from the second mode: 3·3 ≤ 12
        auto, als = (decompose.tensor_ring(tensor, 3, method=method) for method in ("auto", "als"))
        assert [tuple(c.shape) for c in svd.cores] == [(3, n, 3) for n in tensor.shape]
        for result in (svd, auto, als):
            assert result.relative_error == pytest.approx(relative(ring(result.cores), tensor), rel=1e-9)
        assert auto.relative_error <= svd.relative_error
        with pytest.raises(ValueError, match="R_k·R_k"):
            decompose.tensor_ring(random(4, 4, 4, 4), 3, method="svd")
        assert decompose.tensor_ring(random(4, 4, 4, 4), 3).relative_error < 1.0

    def test_exact_where_the_svd_is(self):
        tensor = random(12, 3, 4)
        assert decompose.tensor_ring(tensor, (3, 4, 12)).relative_error < 1e-12

    @pytest.mark.parametrize("rank", [1, 3])
    def test_one_mode(self, rank):
        vector = random(7)
        cores, error = decompose.tensor_ring(vector, 1)
        assert relative(ring(cores), vector) < 1e-14
        assert error < 1e-14

    def test_largest_rank_holds_every_tensor(self):
        tensor = random(3, 4, 2)
        rank = largest_ring_rank(tensor.shape)
        assert decompose.tr_als(tensor, rank, sweeps=200, tol=1e-12).relative_error < 1e-6
        with pytest.warns(UserWarning, match=r"tr_als: ranks \(50, 50, 50\) exceeds .*clipped to"):
            assert max(decompose.tr_als(tensor, 50, sweeps=2).cores[0].shape) <= max(rank, 4)

    def test_same_seed_same_bits(self):
        tensor = random(4, 4, 4, 4, dtype=torch.float32)
        first, second = (decompose.tensor_ring(tensor, 3, sweeps=5) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))
        other = decompose.tensor_ring(tensor, 3, sweeps=5, seed=1)
        assert not torch.equal(first.cores[0], other.cores[0])

    def test_tr_matrix(self):
        matrix = random(12, 10)
        cores, error = decompose.tr_matrix(matrix, 3, (3, 4), (2, 5))
        assert [tuple(c.shape) for c in cores] == [(3, 3, 2, 3), (3, 4, 5, 3)]
        assert error == pytest.approx(relative(matrix_ring(cores), matrix), rel=1e-9, abs=1e-12)
        lossy, error = decompose.tr_matrix(random(24, 30), 2, (2, 3, 4), (5, 3, 2))
        assert error == pytest.approx(relative(matrix_ring(lossy), random(24, 30)), rel=1e-9)
        assert error < 1.0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_dtype_and_strides(self, dtype):
        tensor = random(6, 5, 4).to(dtype)
        strided = torch.stack([tensor, tensor], dim=-1)[..., 1]
        for first, second in zip(
            decompose.tensor_ring(tensor, 2).cores, decompose.tensor_ring(strided, 2).cores, strict=True
        ):
            assert first.dtype == dtype
            assert first.is_contiguous()
            assert torch.equal(first, second)

    def test_zero_tensor(self):
        for method in ("auto", "als", "svd"):
            assert decompose.tensor_ring(torch.zeros(6, 5, 4), 2, method=method).relative_error == 0.0


@pytest.mark.parametrize("ranks", [(2, 3, 4), (1, 3, 3)])
def test_svd_agrees_with_tensorly(ranks):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_ring

    tensor = random(6, 5, 4)
    theirs = tensor_ring(tensorly.tensor(tensor.numpy()), rank=[*ranks, ranks[0]], mode=0)
    dense = ring([torch.from_numpy(np.array(core)) for core in theirs])
    ours = decompose.tr_svd(tensor, ranks)
    assert ours.relative_error == pytest.approx(relative(dense, tensor), rel=1e-6)


@pytest.mark.parametrize("sizes", [(6, 5, 4), (4, 4, 4, 4)])
def test_least_squares_are_no_worse_than_tensorly(sizes):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_ring_als

    tensor = random(*sizes)
    rank = [2] * (len(sizes) + 1)
    theirs = tensor_ring_als(
        tensorly.tensor(tensor.numpy()), rank=rank, n_iter_max=100, tol=1e-9, random_state=0, ls_solve="lstsq"
    )
    dense = ring([torch.from_numpy(np.array(core)) for core in theirs])
    ours = min(decompose.tr_als(tensor, 2, tol=1e-9, seed=seed).relative_error for seed in range(3))
    assert ours <= relative(dense, tensor) * 1.03


class TestBadInput:
    @pytest.mark.parametrize("value", [float("nan"), -float("inf")])
    def test_non_finite(self, value):
        tensor = random(6, 4, 5)
        tensor[1, 2, 3] = value
        for name, call in (
            ("tr_svd", lambda: decompose.tr_svd(tensor, 2)),
            ("tr_als", lambda: decompose.tr_als(tensor, 2)),
            ("tensor_ring", lambda: decompose.tensor_ring(tensor, 2)),
            ("tr_matrix", lambda: decompose.tr_matrix(tensor.reshape(6, 20), 2, (2, 3), (4, 5))),
        ):
            with pytest.raises(ValueError, match=f"{name}: .*contains NaN or Inf"):
                call()

    @pytest.mark.parametrize("ranks", [0, (2, 2), (2, 2, -1), (1, 2, 2, 2), (2, 2, 2, 2, 2)])
    def test_wrong_ranks(self, ranks):
        with pytest.raises(ValueError, match="tensor_ring: ranks must be"):
            decompose.tensor_ring(random(6, 4, 5), ranks)

    def test_first_mode_too_small_for_tr_svd(self):
        with pytest.raises(ValueError, match=r"R_0·R_1 must be at most n_1 = 4, got 3·3; use tr_als"):
            decompose.tr_svd(random(4, 5, 6), 3)
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            decompose.tr_svd(random(4), 1)

    def test_options(self):
        tensor = random(4, 5, 6)
        for options, message in (
            ({"ridge": -1.0}, "ridge must be finite and not negative"),
            ({"sweeps": 0}, "sweeps must be at least 1"),
            ({"restarts": 0}, "restarts must be at least 1"),
            ({"tol": math.nan}, "tol must be finite"),
        ):
            with pytest.raises(ValueError, match=f"tr_als: {message}"):
                decompose.tr_als(tensor, 2, **options)
            with pytest.raises(ValueError, match=f"tensor_ring: {message}"):
                decompose.tensor_ring(tensor, 2, **options)
        with pytest.raises(TypeError, match=r"options are ridge, .* got sweps"):
            decompose.tensor_ring(tensor, 2, sweps=3)
        with pytest.raises(ValueError, match="method must be 'auto', 'svd' or 'als', got 'best'"):
            decompose.tensor_ring(tensor, 2, method="best")
