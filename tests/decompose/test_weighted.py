"""Activation-weighted fits: closed form of the SVD, never worse than unweighted, bad covariances."""

import pytest
import torch
from planted import kruskal, matrix_ring, random, relative, ring

from tensorcomp_ext import decompose


def covariance(size, samples=None, seed=11):
    """Of inputs with strongly unequal and correlated features."""
    inputs = random(samples or 4 * size, size, seed=seed) * 2.0 ** -torch.arange(size).remainder(7).double()
    inputs = inputs @ (
        torch.eye(size, dtype=torch.float64) + 0.3 * random(size, size, seed=seed + 1) / size**0.5
    )
    return inputs.T @ inputs / inputs.shape[0]


def dense(format, factors):
    if format == "svd":
        return factors[0] @ factors[1]
    if format == "cp":
        return kruskal(factors)
    if format == "tt":
        return ring(factors)
    if format == "ttm":
        return matrix_ring(factors)
    core = factors[0]
    for mode, factor in enumerate(factors[1:]):
        core = torch.tensordot(factor, core, dims=([1], [mode])).movedim(0, mode)
    return core


def weighted_error(tensor, fit, weights, modes):
    """‖(A − L) C^½‖/‖A C^½‖ from the quadratic form itself."""

    def norm(difference):
        ends = tuple(range(difference.ndim - len(modes), difference.ndim))
        rows = difference.movedim(modes, ends).reshape(-1, weights.shape[0])
        return float((rows @ weights * rows).sum().clamp_min(0.0).sqrt())

    return norm(tensor - fit) / norm(tensor)


PROBLEMS = [
    ("svd", (14, 20), 4, (1,), {}),
    ("tucker2", (9, 12, 3, 3), (3, 4), (1,), {}),
    ("tucker", (6, 8, 9), (3, 3, 4), (1,), {}),
    ("tucker", (6, 5, 4, 5), (3, 3, 3, 3), (2, 3), {}),
    ("tt", (12, 9, 10), (4, 3), (0,), {}),
    ("tt", (12, 9, 10), (4, 3), (0, 1), {}),
    ("tt", (4, 5, 4, 5), (3, 5, 3), (2, 3), {}),
    ("cp", (8, 9, 3, 3), 5, (1,), {}),
    ("cp", (4, 5, 4, 5), 5, (2, 3), {}),
    ("ttm", (20, 20), 4, (1,), {"out_modes": (4, 5), "in_modes": (5, 4)}),
]


@pytest.mark.parametrize(("format", "shape", "rank", "modes", "options"), PROBLEMS)
@pytest.mark.parametrize("samples", [None, 5])
def test_better_than_unweighted(format, shape, rank, modes, options, samples):
    tensor = random(*shape)
    size = int(torch.tensor([shape[m] for m in modes]).prod())
    weights = covariance(size, samples)  # five samples leave it singular
    given = options or {"modes": modes}
    fit = decompose.weighted_fit(tensor, weights, format, rank, **given)
    assert fit.relative_error < 0.98 * fit.unweighted_start
    actual = weighted_error(tensor, dense(format, fit.factors), weights, modes)
    assert fit.relative_error == pytest.approx(actual, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("shape", [(14, 20), (20, 14)])
@pytest.mark.parametrize("rank", [1, 5])
def test_svd_is_the_closed_form(shape, rank):
    tensor, weights = random(*shape), covariance(shape[1])
    root = torch.linalg.cholesky(weights)  # any C = root rootᵀ gives the same error
    tail = torch.linalg.svdvals(tensor @ root)
    fit = decompose.weighted_fit(tensor, weights, "svd", rank, ridge=0.0)
    assert fit.relative_error == pytest.approx(float(tail[rank:].norm() / tail.norm()), rel=1e-9)


@pytest.mark.parametrize(("format", "shape", "rank", "modes", "options"), PROBLEMS)
def test_white_inputs_change_nothing(format, shape, rank, modes, options):
    tensor = random(*shape)
    size = int(torch.tensor([shape[m] for m in modes]).prod())
    fit = decompose.weighted_fit(tensor, 3.0 * torch.eye(size), format, rank, **(options or {"modes": modes}))
    assert fit.relative_error == pytest.approx(fit.unweighted_start, rel=1e-6)
    assert relative(dense(format, fit.factors), tensor) == pytest.approx(fit.relative_error, rel=1e-6)


def test_a_product_of_covariances_is_whitened_away():
    tensor, parts = random(6, 5, 4), (covariance(5), covariance(4, seed=3))
    fit = decompose.weighted_fit(tensor, torch.kron(*parts), "tt", (3, 2), modes=(1, 2), ridge=0.0)
    roots = [torch.linalg.cholesky(part) for part in parts]
    white = torch.einsum("tij,ia,jb->tab", tensor, *roots)
    assert fit.relative_error <= decompose.tt_svd(white, (3, 2)).relative_error * (1 + 1e-6)


def test_full_rank_is_exact():
    tensor, weights = random(6, 8), covariance(8)
    for format in ("svd", "tucker", "tt"):
        fit = decompose.weighted_fit(tensor, weights, format, 6)
        assert relative(dense(format, fit.factors), tensor) < 1e-9


def test_dtype_and_input_left_alone():
    tensor = random(6, 8, dtype=torch.float32)
    before, weights = tensor.clone(), covariance(8).float()
    fit = decompose.weighted_fit(tensor, weights, "svd", 2)
    assert {factor.dtype for factor in fit.factors} == {torch.float32}
    assert torch.equal(tensor, before)


def test_bad_input():
    tensor, weights = random(6, 8), covariance(8)
    skew = weights.clone()
    skew[0, 1] += 1.0
    for arguments, options, message in (
        ((tensor, weights, "block_term", 2), {}, "format must be one of"),
        ((tensor, weights[:4], "svd", 2), {}, r"covariance must be \[8, 8\], got \[4, 8\]"),
        ((tensor, skew, "svd", 2), {}, "covariance must be symmetric"),
        ((tensor, -weights, "svd", 2), {}, "must be positive semidefinite"),
        ((tensor, weights - 0.5 * torch.eye(8), "svd", 2), {}, "positive semidefinite|raise ridge"),
        ((tensor, weights * float("nan"), "svd", 2), {}, "covariance contains NaN or Inf"),
        ((tensor, weights, "svd", 0), {}, "must be at least 1"),
        ((tensor, weights, "svd", 2), {"ridge": -1.0}, "ridge must be finite"),
        ((tensor, weights, "svd", 2), {"iterations": 0}, "iterations must be at least 1"),
        ((tensor, weights, "tt", 2), {"modes": (2,)}, "modes must be different modes of 2"),
        ((random(2, 4, 2), weights, "tt", 2), {}, "tt needs modes"),
        ((tensor, weights, "ttm", 2), {}, "ttm needs out_modes and in_modes"),
    ):
        with pytest.raises(ValueError, match=message):
            decompose.weighted_fit(*arguments, **options)
