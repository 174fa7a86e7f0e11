"""Masked fits: planted tensors under spikes, objectives that do not rise, every format, bad input."""

import itertools

import pytest
import torch
from planted import kruskal, matrix_ring, random, random_ring, relative, ring

from tensorcomp_ext import decompose
from tensorcomp_ext.decompose import masked


def spiked(seed=40):
    """A train of rank 3 with spikes of ten times its largest entry on a tenth of its entries."""
    planted = random_ring((8, 9, 10), (1, 3, 3), seed=seed)
    places = torch.randperm(720, generator=torch.Generator().manual_seed(seed))[:72]
    spikes = torch.zeros(720, dtype=torch.float64)
    spikes[places] = 10 * planted.abs().max()
    return planted, planted + spikes.reshape(planted.shape)


def without_top(tensor, share):
    mask = torch.ones(tensor.numel(), dtype=torch.bool)
    mask[tensor.abs().reshape(-1).topk(round(share * tensor.numel())).indices] = False
    return mask.reshape(tensor.shape)


def observed(shape, share=0.7, seed=7):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def falls(objective):
    """No step raises the objective by more than rounding."""
    slack = 1e-13 * objective[0]
    return all(after <= before * (1 + 1e-9) + slack for before, after in itertools.pairwise(objective))


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


def test_spikes_spoil_the_unmasked_fit():
    planted, tensor = spiked()
    assert relative(ring(decompose.tt_svd(tensor, 3).cores), planted) > 5


@pytest.mark.parametrize("seed", range(40, 120, 10))
@pytest.mark.parametrize(("share", "iterations"), [(0.1, 400), (0.2, 400), (0.3, 1500)])
def test_planted_train_is_recovered_under_spikes(share, iterations, seed):
    planted, tensor = spiked(seed)
    fit = decompose.masked_fit(tensor, without_top(tensor, share), "tt", 3, iterations=iterations)
    assert len(fit.objective) <= iterations
    assert relative(ring(fit.factors), planted) < 1e-10
    assert falls(fit.objective)


def test_half_of_the_entries_are_enough_for_most_trains():
    errors = []
    for seed in (40, 60, 80, 100):
        planted, tensor = spiked(seed)
        fit = decompose.masked_fit(tensor, without_top(tensor, 0.5), "tt", 3, iterations=700)
        errors.append(relative(ring(fit.factors), planted))
        assert falls(fit.objective)
    assert sum(error < 1e-6 for error in errors) >= 3, errors


@pytest.mark.parametrize(("format", "rank"), [("svd", 2), ("tucker", 2), ("tt", 2)])
def test_an_extrapolation_that_raises_the_objective_is_taken_back(format, rank, monkeypatch):
    tensor = random(*((12, 15) if format == "svd" else (6, 7, 8)), seed=2)
    mask = observed(tensor.shape, 0.6)
    begun: list[int] = []
    solver = {"svd": masked.SVDSolver, "tucker": masked.TuckerSolver, "tt": masked.TrainSolver}[format]
    original = solver.begin
    monkeypatch.setattr(solver, "begin", lambda *a: begun.append(1) or original(*a))
    fit = decompose.masked_fit(tensor, mask, format, rank, iterations=100, tol=0.0)
    assert begun
    assert falls(fit.objective)


PROBLEMS = [
    ("svd", (12, 15), 2, {}),
    ("tucker", (7, 8, 9), (2, 3, 2), {}),
    ("tucker2", (9, 8, 3, 3), (2, 2), {}),
    ("tt", (7, 8, 9), (2, 3), {}),
    ("ttm", (12, 20), 2, {"out_modes": (3, 4), "in_modes": (4, 5)}),
    ("cp", (7, 8, 9), 2, {}),
]


@pytest.mark.parametrize(("format", "shape", "rank", "options"), PROBLEMS)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_every_format(format, shape, rank, options, noise):
    everything = torch.ones(shape, dtype=torch.bool)
    seed = decompose.masked_fit(random(*shape), everything, format, rank, iterations=3, **options)
    planted = dense(format, seed.factors)
    tensor = planted + noise * planted.std() * random(*shape, seed=3)
    mask = observed(shape)
    garbage = torch.where(mask, tensor, 1e6)
    fit = decompose.masked_fit(garbage, mask, format, rank, iterations=400, **options)
    assert falls(fit.objective)
    found = dense(format, fit.factors)
    left = float(((found - tensor) * mask).norm())
    assert left == pytest.approx(min(fit.objective), rel=1e-6, abs=1e-12 * float(tensor.norm()))
    assert fit.relative_error == pytest.approx(left / float((tensor * mask).norm()), rel=1e-6, abs=1e-12)
    if noise == 0.0:
        assert fit.relative_error < 1e-5
        assert relative(found, planted) < 1e-2


@pytest.mark.parametrize("format", ["svd", "tucker", "tt", "cp"])
def test_with_a_full_mask_it_is_the_decomposition(format):
    tensor = random(8, 9)
    mask = torch.ones(8, 9, dtype=torch.bool)
    fit = decompose.masked_fit(tensor, mask, format, 3, iterations=3000, tol=1e-12)
    best = float(torch.linalg.svdvals(tensor)[3:].norm() / tensor.norm())
    assert fit.relative_error == pytest.approx(best, rel=1e-3)


def test_cp_by_imputation_where_rows_are_too_large(monkeypatch):
    monkeypatch.setattr(masked, "ROW_TABLE", 0)
    planted = kruskal([random(n, 2, seed=n) for n in (7, 8, 9)])
    fit = decompose.masked_fit(planted, observed(planted.shape), "cp", 2)
    assert falls(fit.objective)
    assert relative(kruskal(fit.factors), planted) < 1e-2


def test_a_row_that_is_not_observed_stays_finite():
    tensor, mask = random(6, 7, 5), observed((6, 7, 5))
    mask[2] = False
    for format in ("cp", "tucker", "tt"):
        fit = decompose.masked_fit(tensor, mask, format, 2, iterations=50)
        assert all(torch.isfinite(factor).all() for factor in fit.factors)
        assert falls(fit.objective)


def test_dtype_and_input_left_alone():
    tensor = random(6, 7, 5, dtype=torch.float32)
    before, mask = tensor.clone(), observed((6, 7, 5))
    fit = decompose.masked_fit(tensor, mask, "tt", 2, iterations=5)
    assert {factor.dtype for factor in fit.factors} == {torch.float32}
    assert torch.equal(tensor, before)
    assert decompose.masked_fit(torch.zeros(4, 5), torch.ones(4, 5) > 0, "svd", 2).relative_error == 0.0


class TestBadInput:
    tensor = random(4, 5, 6)
    mask = torch.ones(4, 5, 6, dtype=torch.bool)

    def test_arguments(self):
        for arguments, options, message in (
            ((self.tensor, self.mask, "block_term", 2), {}, "format must be one of cp, svd, tt"),
            ((self.tensor, self.mask, "svd", 2), {}, "svd needs a matrix"),
            ((self.tensor[0], self.mask[0], "tucker2", 2), {}, "tucker2 needs a kernel"),
            ((self.tensor, self.mask[0], "tt", 2), {}, r"mask must be \[4, 5, 6\], got \[5, 6\]"),
            ((self.tensor, ~self.mask, "tt", 2), {}, "mask leaves no entry"),
            ((self.tensor, self.mask, "tt", (2, 2, 2)), {}, "rank must be an int, 2 inner ranks"),
            ((self.tensor, self.mask, "cp", (2, 2)), {}, "must be one int for cp"),
            ((self.tensor, self.mask, "tt", 2), {"iterations": 0}, "iterations must be at least 1"),
            ((self.tensor, self.mask, "tt", 2), {"tol": -1.0}, "tol must be finite"),
            ((self.tensor, self.mask, "tt", 2), {"in_modes": (2, 2)}, "are for ttm, got them for tt"),
            ((self.tensor[0], self.mask[0], "ttm", 2), {}, "ttm needs out_modes and in_modes"),
        ):
            with pytest.raises(ValueError, match=f"masked_fit: .*{message}"):
                decompose.masked_fit(*arguments, **options)
        with pytest.raises(TypeError, match="mask must be a bool tensor"):
            decompose.masked_fit(self.tensor, self.mask.double(), "tt", 2)

    def test_non_finite(self):
        broken = self.tensor.clone()
        broken[0, 0, 0] = float("inf")
        with pytest.raises(ValueError, match="masked_fit: tensor contains NaN or Inf"):
            decompose.masked_fit(broken, self.mask, "tt", 2)
