"""HOSVD, HOOI and Tucker-2: exactness, error bounds, monotone error, agreement with tensorly."""

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch

from tensorcomp_ext import decompose
from tensorcomp_ext.decompose import svd as svd_module
from tensorcomp_ext.decompose.tucker import _sweep_limit

KERNELS = [
    (6, 5, 3),
    (7, 4, 3, 3),
    (1, 6, 5, 5),
    (9, 1, 3, 1),
    (16, 17, 3, 3),
    (5, 6, 2, 3, 2),
    (13, 3, 1, 1),
]


@pytest.fixture(params=["direct", "gram"])
def route(request, monkeypatch):
    if request.param == "gram":
        monkeypatch.setattr(svd_module, "DENSE_SVD_WORK", 0)
        monkeypatch.setattr("tensorcomp_ext.decompose.unfolding.BLOCK_ELEMENTS", 64)


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rebuild(core, factors):
    """Index-by-index meaning of the result: every mode product as a plain matrix product."""
    for mode, factor in factors.items():
        core = torch.tensordot(factor, core, dims=([1], [mode])).movedim(0, mode)
    return core


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def planted(shape, rank, noise, seed=0):
    core = random(rank, rank, *shape[2:], seed=seed)
    clean = rebuild(
        core, {0: random(shape[0], rank, seed=seed + 1), 1: random(shape[1], rank, seed=seed + 2)}
    )
    return clean + noise * clean.norm() / clean.numel() ** 0.5 * random(*shape, seed=seed + 3)


@pytest.mark.parametrize("method", ["hooi", "hosvd"])
@pytest.mark.parametrize("shape", KERNELS)
def test_full_rank_is_exact(shape, method, route):
    weight = random(*shape)
    core, factor_out, factor_in, error = decompose.tucker2(weight, shape[0], shape[1], method)
    assert core.shape == shape
    assert relative(rebuild(core, {0: factor_out, 1: factor_in}), weight) < 1e-12
    assert error < 1e-12


@pytest.mark.parametrize("modes", [(0,), (2,), (0, 1), (1, 0), (0, 1, 2), (-1, 1)])
def test_hosvd_is_exact_at_full_rank_and_bounded_below_it(modes, route):
    tensor = random(6, 7, 8)
    sizes = [tensor.shape[m] for m in modes]
    full = decompose.hosvd(tensor, sizes, modes)
    assert relative(rebuild(*full), tensor) < 1e-12
    for rank in (1, 3, 5):
        core, factors = decompose.hosvd(tensor, [rank] * len(modes), modes)
        bound = 0.0
        for mode in modes:
            energy = decompose.singular_values(decompose.unfold(tensor, mode)) ** 2
            bound += float(energy[rank:].sum() / energy.sum())
        assert relative(rebuild(core, factors), tensor) ** 2 <= bound * (1 + 1e-12)
        for factor in factors.values():
            assert torch.allclose(factor.T @ factor, torch.eye(rank, dtype=torch.float64), atol=1e-12)


def test_energy_threshold_bounds_the_tucker2_error():
    weight = planted((24, 20, 3, 3), 6, noise=0.3)
    ranks = []
    for mode in (0, 1):
        energy = decompose.singular_values(decompose.unfold(weight, mode)) ** 2
        ranks.append(1 + int((energy.cumsum(0) < 0.95 * energy.sum()).sum()))
    assert decompose.tucker2(weight, *ranks, "hosvd").relative_error <= (2 * 0.05) ** 0.5


@pytest.mark.parametrize("shape", [(16, 12, 3, 3), (9, 30, 5), (12, 11, 2, 2, 2)])
@pytest.mark.parametrize("noise", [0.0, 0.5, 50.0])
def test_hooi_never_gets_worse(shape, noise, route):
    weight = planted(shape, 4, noise)
    result = decompose.hooi(weight, (4, 3), (0, 1), tol=0.0, max_sweeps=12)
    errors = result.relative_errors
    assert all(later <= earlier + 1e-13 for earlier, later in itertools.pairwise(errors))
    core, factors = decompose.hosvd(weight, (4, 3), (0, 1))
    assert errors[0] <= relative(rebuild(core, factors), weight) + 1e-13
    assert errors[-1] == pytest.approx(relative(rebuild(*result[:2]), weight), rel=1e-9, abs=1e-13)


def test_hooi_stops_at_the_tolerance():
    weight = planted((16, 12, 3, 3), 4, 0.1)
    errors = decompose.hooi(weight, (4, 4), (0, 1)).relative_errors
    assert len(errors) < 20
    assert abs(errors[-1] - errors[-2]) < 1e-5
    assert len(decompose.hooi(weight, (4,), (1,)).relative_errors) == 1


def test_planted_tensor_is_recovered(route):
    weight = planted((20, 15, 3, 3), 5, 0.0)
    result = decompose.tucker2(weight, 5, 5)
    assert result.relative_error < 1e-12
    assert relative(rebuild(result.core, {0: result.factor_out, 1: result.factor_in}), weight) < 1e-12


def test_small_errors_are_told_from_zero():
    weight = planted((20, 15, 3, 3), 5, 1e-9)
    result = decompose.tucker2(weight, 5, 5)
    actual = relative(rebuild(result.core, {0: result.factor_out, 1: result.factor_in}), weight)
    assert result.relative_error == pytest.approx(actual, rel=1e-3)
    assert 1e-10 < actual < 1e-8


@pytest.mark.parametrize("shape", [(12, 9, 3), (16, 20, 3, 3), (8, 6, 3, 2, 2)])
@pytest.mark.parametrize("ranks", [(3, 4), (6, 2)])
def test_agrees_with_tensorly(shape, ranks, route):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker

    weight = planted(shape, 4, 0.4)
    (core, factors), _ = partial_tucker(
        tensorly.tensor(weight.numpy()), rank=list(ranks), modes=[0, 1], init="svd", n_iter_max=200, tol=1e-12
    )
    theirs = rebuild(torch.tensor(core), {m: torch.tensor(f.copy()) for m, f in enumerate(factors)})
    ours = decompose.hooi(weight, ranks, (0, 1), tol=1e-12, max_sweeps=200)
    assert relative(rebuild(*ours[:2]), weight) <= relative(theirs, weight) * (1 + 1e-8)
    assert relative(rebuild(*ours[:2]), theirs) < 1e-4


def test_ranks_beyond_the_reduced_unfolding_keep_their_size(route):
    # With rank_in = 1 and a 1 x 1 window the unfolding for the outputs has a single column.
    result = decompose.tucker2(random(8, 6, 1, 1), 5, 1)
    assert result.core.shape == (5, 1, 1, 1)
    assert torch.allclose(
        result.factor_out.T @ result.factor_out, torch.eye(5, dtype=torch.float64), atol=1e-12
    )


@pytest.mark.parametrize("method", ["hooi", "hosvd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_layout(dtype, method):
    weight = planted((12, 10, 3, 3), 3, 0.1).to(dtype)
    plain = decompose.tucker2(weight, 3, 3, method)
    last = decompose.tucker2(weight.to(memory_format=torch.channels_last), 3, 3, method)
    sliced = decompose.tucker2(torch.stack([weight, weight], dim=-1)[..., 0], 3, 3, method)
    assert {plain.core.dtype, plain.factor_out.dtype, plain.factor_in.dtype} == {dtype}
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    dense = rebuild(plain.core.double(), {0: plain.factor_out.double(), 1: plain.factor_in.double()})
    for other in (last, sliced):
        again = rebuild(other.core.double(), {0: other.factor_out.double(), 1: other.factor_in.double()})
        assert relative(again, dense) < tolerance
        assert other.core.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_is_left_alone(dtype, route):
    weight = random(12, 10, 3, 3, dtype=dtype)
    before = weight.clone()
    decompose.tucker2(weight, 3, 4)
    decompose.tucker2(weight, 12, 10, "hosvd")
    decompose.svd_factors(weight[..., 0, 0], 10)
    decompose.singular_values(weight[0, 0])
    assert torch.equal(weight, before)


def test_same_input_gives_same_bits():
    weight = random(32, 48, 3, 3, dtype=torch.float32)
    first, second = (decompose.tucker2(weight, 7, 9) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def test_zero_weight():
    result = decompose.tucker2(torch.zeros(6, 5, 3, 3), 2, 2)
    assert result.relative_error == 0.0
    assert not result.core.any()


def test_sweep_limit_binds_only_huge_kernels():
    assert _sweep_limit((512, 512, 3, 3), {0: 256, 1: 256}) == 100
    assert _sweep_limit((4096, 4096, 3, 3), {0: 256, 1: 256}) < 10
    assert _sweep_limit((8192, 8192, 3, 3), {0: 4096, 1: 4096}) == 2


class TestBadInput:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite(self, value):
        weight = random(4, 5, 3, 3)
        weight[1, 2, 0, 1] = value
        for call in (
            lambda: decompose.tucker2(weight, 2, 2),
            lambda: decompose.hosvd(weight, (2,), (0,)),
            lambda: decompose.hooi(weight, (2,), (0,)),
        ):
            with pytest.raises(ValueError, match="contains NaN or Inf"):
                call()

    def test_ranks(self):
        weight = random(4, 5, 3, 3)
        with pytest.raises(ValueError, match="rank_in must be at least 1, got 0"):
            decompose.tucker2(weight, 2, 0)
        with pytest.raises(ValueError, match="rank of mode 1 must be at least 1, got -1"):
            decompose.hosvd(weight, (2, -1), (0, 1))
        with pytest.warns(UserWarning, match="rank_out 40 exceeds 4; clipped to 4") as record:
            assert decompose.tucker2(weight, 40, 5).core.shape == (4, 5, 3, 3)
        assert record[0].filename == __file__
        with pytest.warns(UserWarning, match="rank of mode 0 40 exceeds 4; clipped to 4"):
            decompose.hooi(weight, (40, 2), (0, 1))

    def test_shapes_modes_and_methods(self):
        weight = random(4, 5, 3, 3)
        with pytest.raises(ValueError, match="3 to 5 dimensions"):
            decompose.tucker2(random(4, 5), 2, 2)
        with pytest.raises(ValueError, match="one rank for each mode"):
            decompose.hosvd(weight, (2, 2), (0,))
        with pytest.raises(ValueError, match="modes must differ"):
            decompose.hosvd(weight, (2, 2), (0, -4))
        with pytest.raises(ValueError, match="modes must be in"):
            decompose.hosvd(weight, (2,), (4,))
        with pytest.raises(ValueError, match="max_sweeps"):
            decompose.hooi(weight, (2,), (0,), max_sweeps=0)
        with pytest.raises(ValueError, match="'hooi' or 'hosvd', got 'als'"):
            decompose.tucker2(weight, 2, 2, "als")


def _peak_growth(size, window, rank, method):
    """Bytes by which the peak resident size grows during one tucker2, measured in a process of its own."""
    script = f"""
        import resource, torch
        from tensorcomp_ext import decompose
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        decompose.tucker2(torch.randn(96, 96, 3, 3), 8, 8)
        torch.manual_seed(0)
        u, v = torch.randn({size}, {rank}), torch.randn({size}, {rank})
        weight = torch.empty({size}, {size}, {window}, {window})
        for i in range({window}):
            for j in range({window}):
                weight[:, :, i, j] = u @ torch.randn({rank}, {rank}) @ v.T
        weight.add_(torch.randn({window}))
        before = peak()
        result = decompose.tucker2(weight, {rank}, {rank}, {method!r})
        print(before, peak() - before, result.relative_error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=580,
    )
    before, growth, error = run.stdout.split()
    return int(before), int(growth), float(error)


def test_no_float64_copy_of_the_weight():
    size, window = 1280, 5
    _, growth, _ = _peak_growth(size, window, 32, "hooi")
    copy = 8 * size * size * window * window
    assert growth < 0.75 * copy


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_4096_by_36864_unfolding_in_two_gigabytes():
    before, growth, error = _peak_growth(4096, 3, 256, "hooi")
    assert before + growth < 2e9
    assert error < 1.0
