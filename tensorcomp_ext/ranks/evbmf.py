"""Empirical variational Bayesian matrix factorisation with its analytic global solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from .. import decompose

_Array = NDArray[np.float64]

SCAN_POINTS = 400
DEAD = 1e-12  # singular values below this share of the largest belong to dead channels


class EVBMFResult(NamedTuple):
    """Rank, noise variance σ², the singular value a component must exceed, and the shrunk kept values."""

    rank: int
    noise_variance: float
    threshold: float
    shrunk: Tensor


def _spectrum(
    matrix: Tensor | None, spectrum: object, shape: Sequence[int] | None
) -> tuple[_Array, int, int]:
    if (matrix is None) == (spectrum is None):
        raise ValueError("evbmf: give either a matrix or spectrum= with shape=")
    if matrix is not None:
        if shape is not None:
            raise ValueError("evbmf: shape= belongs to spectrum=; a matrix has its own")
        values = decompose.singular_values(matrix).numpy()
        rows, columns = matrix.shape
    else:
        if shape is None or len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"evbmf: spectrum= needs shape=(L, M) with positive sizes, got {shape}")
        if isinstance(spectrum, Tensor):
            spectrum = spectrum.detach().cpu().double().numpy()
        values = np.sort(np.asarray(spectrum, dtype=np.float64).ravel())[::-1]
        rows, columns = int(shape[0]), int(shape[1])
        if not 1 <= values.size <= min(rows, columns):
            raise ValueError(
                f"evbmf: a {rows} x {columns} matrix has 1 to {min(rows, columns)} singular values, "
                f"got {values.size}"
            )
        if not np.isfinite(values).all() or values[-1] < 0.0:
            raise ValueError("evbmf: singular values must be finite and not negative")
    return values, min(rows, columns), max(rows, columns)


def _tau_lower(alpha: float, exact: bool) -> float:
    """τ̲: 2.5129√α, or the root of Φ(τ) + Φ(τ/α) = 0 with Φ(z) = ln(1 + z)/z − ½."""
    if not exact:
        return 2.5129 * math.sqrt(alpha)

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    # Φ falls and vanishes at 2.5129, so the root lies between 2.5129α and 2.5129.
    return float(brentq(lambda tau: phi(tau) + phi(tau / alpha), 2.5 * alpha, 2.52, xtol=1e-14))


def _free_energy(log_variance: _Array, s: _Array, m: int, alpha: float, x_lower: float) -> _Array:
    """Free energy (up to constants) at each candidate ln σ²; `s` are all values kept, `m` the longer side."""
    x = s**2 / (m * np.exp(log_variance)[:, None])  # [candidates, L]
    gap = np.maximum(x - (1 + alpha), 2 * math.sqrt(alpha))
    tau = 0.5 * (gap + np.sqrt(np.maximum(gap**2 - 4 * alpha, 0.0)))
    kept = x - tau + np.log((tau + 1) / x) + alpha * np.log(tau / alpha + 1)
    energy: _Array = np.where(x > x_lower, kept, x - np.log(x)).sum(axis=1)
    return energy


def _noise_variance(s: _Array, m: int, alpha: float, x_lower: float) -> float:
    size = s.size
    squares = s**2
    pruned = min(math.ceil(size / (1 + alpha)) - 1, size)
    upper = squares.sum() / (size * m)
    lower = min(max(squares[pruned] / (m * x_lower), squares[pruned:].mean() / m), upper)

    def objective(log_variance: float) -> float:
        return float(_free_energy(np.array([log_variance]), s, m, alpha, x_lower)[0])

    # About one local minimum per candidate rank: scan first, then refine beside the best point only.
    grid = np.linspace(math.log(lower), math.log(upper), SCAN_POINTS)
    energies = _free_energy(grid, s, m, alpha, x_lower)
    best = int(energies.argmin())
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, SCAN_POINTS - 1)]
    if left < right:
        refined = minimize_scalar(objective, bounds=(left, right), method="bounded", options={"xatol": 1e-10})
        if refined.fun < energies[best]:
            return math.exp(float(refined.x))
    return math.exp(float(grid[best]))


def evbmf(
    matrix: Tensor | None = None,
    *,
    spectrum: Tensor | Sequence[float] | NDArray[np.floating] | None = None,
    shape: tuple[int, int] | None = None,
    exact_threshold: bool = False,
) -> EVBMFResult:
    """Rank of a noisy matrix by empirical variational Bayes (Nakajima, Sugiyama, Babacan and Tomioka, 2013).

    For an L × M matrix, L ≤ M, α = L/M, τ̲ = 2.5129√α and x̲ = (1 + τ̲)(1 + α/τ̲), the noise variance σ²
    minimises the free energy over the spectrum, the rank is the number of singular values above
    √(Mσ²x̲), and a kept value s is shrunk to (s/2)(q + √(q² − 4LMσ⁴/s⁴)) with q = 1 − (L + M)σ²/s².

    Arguments:
        matrix: [m, n], either way up; or instead
        spectrum: its singular values in any order, with `shape` = (L, M). Absent values count as zero.
        exact_threshold: solve for τ̲ instead of using 2.5129√α, which is exact only for square matrices.

    Values below 1e-12 of the largest (dead channels) are dropped and L shrinks with them. A zero matrix has
    rank 0. Raises ValueError for NaN, Inf, negative values or a spectrum that does not fit its shape. The
    cost is that of `decompose.singular_values`.
    """
    values, _, m = _spectrum(matrix, spectrum, shape)
    largest = float(values[0])
    if largest == 0.0:
        return EVBMFResult(0, 0.0, 0.0, torch.zeros(0, dtype=torch.float64))
    s = values[values > DEAD * largest] / largest  # scale-free, so that no square can overflow
    alpha = s.size / m
    tau = _tau_lower(alpha, exact_threshold)
    x_lower = (1 + tau) * (1 + alpha / tau)
    variance = _noise_variance(s, m, alpha, x_lower)
    threshold = math.sqrt(m * variance * x_lower)
    kept = s[s > threshold]
    q = 1 - (s.size + m) * variance / kept**2
    shrunk = kept / 2 * (q + np.sqrt(np.maximum(q**2 - 4 * s.size * m * variance**2 / kept**4, 0.0)))
    return EVBMFResult(
        int(kept.size), variance * largest * largest, threshold * largest, torch.from_numpy(shrunk * largest)
    )
