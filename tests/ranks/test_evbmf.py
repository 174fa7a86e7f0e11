"""EVBMF against published-formula test vectors, planted ranks and an independent brute-force minimiser."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from tensorcomp_ext import decompose
from tensorcomp_ext.decompose import svd as svd_module
from tensorcomp_ext.ranks import EVBMFResult, evbmf
from tensorcomp_ext.ranks.evbmf import _tau_lower

INDEX = np.arange(1, 41)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("spectrum", "shape", "variance", "rank"),
    [
        # Descending into the wrong local minimum gives variance 0.0304 and rank 9 here.
        (30 / INDEX, (40, 90), 0.02838, 10),
        (30 * 0.9 ** (INDEX - 1.0), (40, 90), 0.1117, 16),
        ([10.0, 8.0, 6.0, 4.0, 2.0] + [1.0] * 15, (20, 50), 0.02651, 4),
    ],
)
def test_vectors(spectrum, shape, variance, rank):
    result = evbmf(spectrum=spectrum, shape=shape)
    assert isinstance(result, EVBMFResult)
    assert result.rank == rank == len(result.shrunk)
    assert result.noise_variance == pytest.approx(variance, rel=1e-3)
    assert evbmf(spectrum=spectrum, shape=shape[::-1]).rank == rank


def test_descent_alone_stops_in_another_minimum():
    """Why the variance is searched on a grid first: the objective has about one minimum for each rank."""
    s, size, m = 30 / INDEX, 40, 90
    tau = 2.5129 * math.sqrt(size / m)
    x_lower = (1 + tau) * (1 + size / m / tau)
    pruned = math.ceil(size / (1 + size / m)) - 1
    low = max(s[pruned] ** 2 / (m * x_lower), (s[pruned:] ** 2).mean() / m)
    bounds = (low, (s**2).sum() / (size * m))
    found = minimize_scalar(free_energy, args=(s, size, m, x_lower), bounds=bounds, method="bounded").x
    assert found == pytest.approx(0.0304, rel=1e-2)
    assert int((s > math.sqrt(m * found * x_lower)).sum()) == 9
    best = evbmf(spectrum=s, shape=(size, m)).noise_variance
    assert free_energy(best, s, size, m, x_lower) < free_energy(found, s, size, m, x_lower)


def test_threshold_of_the_flat_tail_vector():
    result = evbmf(spectrum=[10.0, 8.0, 6.0, 4.0, 2.0] + [1.0] * 15, shape=(20, 50))
    assert result.threshold == pytest.approx(2.0728, abs=5e-5)


@pytest.mark.parametrize("transpose", [False, True])
def test_planted_rank_and_pure_noise(transpose):
    planted = random(100, 10) @ random(10, 300, seed=1) + 0.1 * random(100, 300, seed=2)
    noise = random(256, 2304, seed=3)
    if transpose:
        planted, noise = planted.T, noise.T
    result = evbmf(planted)
    assert result.rank == 10
    assert result.noise_variance == pytest.approx(0.01, rel=0.05)
    assert evbmf(noise).rank == 0
    assert evbmf(noise).noise_variance == pytest.approx(1.0, rel=0.02)


def free_energy(variance, s, size, m, x_lower):
    """The objective, one value at a time as it is written down."""
    alpha, total = size / m, 0.0
    for value in s:
        x = value**2 / (m * variance)
        if x <= x_lower:
            total += x - math.log(x)
        else:
            gap = x - (1 + alpha)
            tau = 0.5 * (gap + math.sqrt(gap**2 - 4 * alpha))
            total += x - tau + math.log((tau + 1) / x) + alpha * math.log(tau / alpha + 1)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_no_better_variance_exists(seed):
    rng = np.random.default_rng(seed)
    size, m = int(rng.integers(3, 30)), int(rng.integers(30, 80))
    s = np.sort(rng.lognormal(0.0, 1.2, size))[::-1]
    result = evbmf(spectrum=s, shape=(size, m))
    tau = 2.5129 * math.sqrt(size / m)
    x_lower = (1 + tau) * (1 + size / m / tau)
    ours = free_energy(result.noise_variance, s, size, m, x_lower)
    pruned = math.ceil(size / (1 + size / m)) - 1
    low = max(s[pruned] ** 2 / (m * x_lower), (s[pruned:] ** 2).mean() / m)
    grid = np.geomspace(low, (s**2).sum() / (size * m), 5000)
    assert ours <= min(free_energy(v, s, size, m, x_lower) for v in grid) + 1e-6 * abs(ours)
    assert result.threshold == pytest.approx(math.sqrt(m * result.noise_variance * x_lower), rel=1e-9)


def test_shrunk_values():
    s, m, size = 30 / INDEX, 90, 40
    result = evbmf(spectrum=s, shape=(size, m))
    variance = result.noise_variance
    for value, shrunk in zip(s, result.shrunk.tolist(), strict=False):
        q = 1 - (size + m) * variance / value**2
        expected = value / 2 * (q + math.sqrt(q**2 - 4 * size * m * variance**2 / value**4))
        assert shrunk == pytest.approx(expected, rel=1e-9)
        assert shrunk < value


def test_dead_channels_shrink_the_matrix(monkeypatch):
    alive = random(30, 4) @ random(4, 200, seed=1) + 0.1 * random(30, 200, seed=2)
    padded = torch.zeros(37, 200, dtype=torch.float64)
    padded[torch.randperm(37, generator=torch.Generator().manual_seed(0))[:30]] = alive
    expected = evbmf(alive)
    for work in (svd_module.DENSE_SVD_WORK, 0):  # the real SVD and the Gram matrix
        monkeypatch.setattr(svd_module, "DENSE_SVD_WORK", work)
        result = evbmf(padded)
        assert result.rank == expected.rank == 4
        assert result.noise_variance == pytest.approx(expected.noise_variance, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1e-8, 1e8, 1e200])
def test_scale_does_not_matter(scale):
    result = evbmf(spectrum=30 * scale / INDEX, shape=(40, 90))
    assert result.rank == 10
    assert result.threshold == pytest.approx(scale * evbmf(spectrum=30 / INDEX, shape=(40, 90)).threshold)


def test_degenerate_matrices():
    assert evbmf(torch.zeros(4, 6)) == (0, 0.0, 0.0, pytest.approx([]))
    assert evbmf(random(1, 25)).rank == 0
    assert evbmf(torch.ones(1, 1)).rank == 0
    assert evbmf(torch.ones(6, 9)).rank in (0, 1)


def test_exact_threshold():
    assert _tau_lower(0.1, exact=True) == pytest.approx(2.600 * math.sqrt(0.1), rel=1e-3)
    assert _tau_lower(1.0, exact=True) == pytest.approx(2.5129, abs=1e-4)
    for alpha in (1e-4, 0.03, 0.5):
        tau = _tau_lower(alpha, exact=True)
        assert sum(math.log1p(z) / z - 0.5 for z in (tau, tau / alpha)) == pytest.approx(0.0, abs=1e-10)
    planted = random(40, 5) @ random(5, 400, seed=1) + 0.1 * random(40, 400, seed=2)
    assert evbmf(planted, exact_threshold=True).rank == 5
    assert evbmf(planted, exact_threshold=True).threshold > evbmf(planted).threshold


def test_spectrum_and_matrix_agree():
    matrix = random(12, 40)
    from_spectrum = evbmf(spectrum=decompose.singular_values(matrix).flip(0), shape=(40, 12))
    assert from_spectrum.noise_variance == pytest.approx(evbmf(matrix).noise_variance, rel=1e-9)


def test_bad_input():
    matrix = random(4, 5)
    with pytest.raises(ValueError, match="either a matrix or spectrum="):
        evbmf()
    with pytest.raises(ValueError, match="either a matrix or spectrum="):
        evbmf(matrix, spectrum=[1.0], shape=(1, 1))
    with pytest.raises(ValueError, match="needs shape="):
        evbmf(spectrum=[1.0])
    with pytest.raises(ValueError, match="belongs to spectrum="):
        evbmf(matrix, shape=(4, 5))
    with pytest.raises(ValueError, match="1 to 2 singular values, got 3"):
        evbmf(spectrum=[3.0, 2.0, 1.0], shape=(2, 9))
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="finite and not negative"):
            evbmf(spectrum=[1.0, bad], shape=(2, 9))
    matrix[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        evbmf(matrix)
