"""Fits in the norm of a layer's patches: errors against outputs, factors against others of that rank."""

import pytest
import torch
import torch.nn.functional as F

from tensorcomp_ext import decompose
from tensorcomp_ext.decompose.output_fit import KernelFit, MatrixFit, output_error


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(factors):
    core, out, into = factors
    return torch.einsum("ab...,ta,sb->ts...", core, out, into)


KERNEL, IMAGES = random(12, 7, 3, 3), random(4, 7, 9, 10, seed=1).cumsum(-1).relu()
PATCHES = F.unfold(IMAGES, 3, padding=1).transpose(1, 2).flatten(0, 1)
GRAM = PATCHES.T @ PATCHES
RANKS = [(1, 1), (5, 3), (12, 2), (4, 7), (9, 6)]


@pytest.mark.parametrize("ranks", RANKS)
def test_the_error_is_that_of_the_outputs(ranks):
    fit = KernelFit(KERNEL, GRAM)
    approximation = dense(fit.factors(ranks))
    exact = F.conv2d(IMAGES, KERNEL, padding=1)
    distance = (F.conv2d(IMAGES, approximation, padding=1) - exact).norm() / exact.norm()
    assert fit.squared_error(ranks) ** 0.5 == pytest.approx(float(distance), rel=1e-5)
    assert output_error(KERNEL, approximation, GRAM) == pytest.approx(float(distance), rel=1e-9)


@pytest.mark.parametrize("ranks", RANKS)
def test_no_worse_in_the_outputs_than_a_fit_of_the_weights(ranks):
    plain = decompose.tucker2(KERNEL, *ranks)
    unaware = dense((plain.core, plain.factor_out, plain.factor_in))
    assert KernelFit(KERNEL, GRAM).squared_error(ranks) ** 0.5 <= output_error(KERNEL, unaware, GRAM) + 1e-9


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", [(12, 7, 3, 3), (12, 7, 5), (12, 7, 1, 1), (12, 7, 2, 1, 2)])
def test_without_a_moment_it_is_a_truncated_hosvd(ranks, shape):
    weight = random(*shape)
    if ranks[0] > ranks[1] * weight[0, 0].numel() or ranks[1] > ranks[0] * weight[0, 0].numel():
        ranks = (min(ranks), min(ranks))
    fit = KernelFit(weight)
    error = float((dense(fit.factors(ranks)) - weight).norm() / weight.norm())
    assert fit.squared_error(ranks) ** 0.5 == pytest.approx(error, rel=1e-9, abs=1e-7)
    bound = sum(
        float((torch.linalg.svdvals(decompose.unfold(weight, n))[r:] ** 2).sum()) for n, r in enumerate(ranks)
    )
    assert error**2 <= bound / float(weight.norm()) ** 2 + 1e-12
    hooi = decompose.tucker2(weight, *ranks).relative_error
    assert hooi <= error + 1e-9  # what the rule predicts, the decomposition keeps


@pytest.mark.parametrize("gram", [None, GRAM])
def test_full_rank_is_exact(gram):
    fit = KernelFit(KERNEL, gram)
    assert fit.squared_error((12, 7)) == pytest.approx(0.0, abs=1e-12)
    assert torch.allclose(dense(fit.factors((12, 7))), KERNEL, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_a_matrix_is_fitted_as_well_as_can_be(rank):
    weight, rows = random(9, 14), random(200, 14, seed=1) @ random(14, 14, seed=2)
    gram = rows.T @ rows
    fit = MatrixFit(weight, gram)
    a, b = fit.factors((rank,))
    distance = float((rows @ (a @ b - weight).T).norm() / (rows @ weight.T).norm())
    assert fit.squared_error((rank,)) ** 0.5 == pytest.approx(distance, rel=1e-4, abs=1e-7)
    best = decompose.weighted_fit(weight, gram, "svd", rank).relative_error
    assert distance == pytest.approx(best, rel=1e-4, abs=1e-7)
    plain = MatrixFit(weight)
    tail = torch.linalg.svdvals(weight)[rank:].norm() / weight.norm()
    assert plain.squared_error((rank,)) ** 0.5 == pytest.approx(float(tail), abs=1e-7)


def test_inputs_without_energy_and_dead_channels():
    assert KernelFit(KERNEL, torch.zeros(63, 63)).squared_error((5, 3)) == pytest.approx(
        KernelFit(KERNEL).squared_error((5, 3))
    )
    images = IMAGES.clone()
    images[:, 2:6] = 0.0  # three channels are alive
    rows = F.unfold(images, 3, padding=1).transpose(1, 2).flatten(0, 1)
    fit = KernelFit(KERNEL.float(), (rows.T @ rows).float())
    factors = fit.factors((12, 3))
    assert fit.squared_error((12, 3)) < 1e-4
    assert all(part.isfinite().all() and part.dtype == torch.float32 for part in factors)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"KernelFit: gram must be \[63, 63\], got \[7, 7\]"):
        KernelFit(KERNEL, torch.eye(7))
    with pytest.raises(ValueError, match="NaN or Inf"):
        MatrixFit(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="MatrixFit: weight"):
        MatrixFit(KERNEL)
