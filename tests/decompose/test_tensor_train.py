"""TT-SVD and TTM-SVD: exactness, error bound, agreement with tensorly, ranks, bad input."""

import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from planted import matrix_ring, random, random_ring, relative, ring, tails

from tensorcomp_ext import decompose
from tensorcomp_ext.decompose import svd as svd_module

SIZES = [(7,), (5, 9), (9, 5), (4, 5, 6), (3, 1, 7, 2), (2, 3, 4, 3, 2), (1, 1, 5)]


@pytest.fixture(params=["direct", "gram"])
def route(request, monkeypatch):
    if request.param == "gram":
        monkeypatch.setattr(svd_module, "DENSE_SVD_WORK", 0)
        monkeypatch.setattr("tensorcomp_ext.decompose.unfolding.BLOCK_ELEMENTS", 64)


@pytest.mark.parametrize("sizes", SIZES)
def test_full_rank_is_exact(sizes, route):
    tensor = random(*sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cores, error = decompose.tt_svd(tensor, 10_000)
    assert relative(ring(cores), tensor) < 1e-12
    assert error < 1e-12
    for left, core, right in zip(sizes, cores, sizes[1:], strict=False):
        assert core.shape[1] == left
        assert core.shape[2] <= right * 10_000


@pytest.mark.parametrize("ranks", [1, 2, (2, 5, 3), (1, 4, 1), (3, 3, 3)])
def test_error_is_within_the_tails(ranks, route):
    tensor = random(4, 5, 6, 3)
    cores, error = decompose.tt_svd(tensor, ranks)
    inner = [core.shape[2] for core in cores[:-1]]
    bound = sum(float(tail[rank]) for tail, rank in zip(tails(tensor), inner, strict=True))
    actual = float((ring(cores) - tensor).norm())
    assert actual**2 <= bound * (1 + 1e-12)
    # Every bond alone is a lower bound.
    for tail, rank in zip(tails(tensor), inner, strict=True):
        assert actual**2 >= float(tail[rank]) * (1 - 1e-12)
    assert error == pytest.approx(actual / float(tensor.norm()), rel=1e-9)


@pytest.mark.parametrize("ranks", [(2, 3, 2), (1, 1, 1), (3, 1, 2)])
def test_planted_ranks_are_recovered(ranks, route):
    tensor = random_ring((5, 4, 6, 3), (1, *ranks))
    cores, error = decompose.tt_svd(tensor, ranks)
    assert relative(ring(cores), tensor) < 1e-12
    assert error < 1e-12


def test_small_errors_are_told_from_zero(route):
    tensor = random_ring((5, 4, 6), (1, 2, 3))
    noisy = tensor + 1e-9 * random(5, 4, 6, seed=9)
    cores, error = decompose.tt_svd(noisy, (2, 3))
    assert 1e-11 < error < 1e-8
    assert error == pytest.approx(relative(ring(cores), noisy), rel=1e-3)


def test_ranks_in_every_form():
    tensor = random(4, 5, 6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uniform = decompose.tt_svd(tensor, 4).cores  # the last bond holds 3 only, which needs no warning
        assert [core.shape[0] for core in uniform] == [1, 4, 4, 3]
        for ranks in [(2, 3, 2), [2, 3, 2], (1, 2, 3, 2, 1), torch.Size((2, 3, 2))]:
            cores = decompose.tt_svd(tensor, ranks).cores
            assert [core.shape[0] for core in cores] == [1, 2, 3, 2]
    with pytest.warns(
        UserWarning, match=r"tt_svd: ranks \(9, 3, 2\) exceeds .*clipped to \(4, 3, 2\)"
    ) as record:
        decompose.tt_svd(tensor, (9, 3, 2))
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match=r"99 exceeds .* clipped to \(4, 18, 3\)"):
        decompose.tt_svd(tensor, 99)
    # A core [1, 5, r] has rank 5 at most, whatever stands to the right of it.
    with pytest.warns(UserWarning, match=r"clipped to \(1, 5, 3\)"):
        assert decompose.train_ranks((4, 5, 6, 3), (1, 12, 3)) == (1, 5, 3)


@pytest.mark.parametrize(
    ("out_modes", "in_modes"), [((3, 4), (2, 5)), ((2, 2, 3), (5, 1, 2)), ((12,), (10,)), ((1, 12), (10, 1))]
)
def test_ttm_svd(out_modes, in_modes, route):
    matrix = random(12, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cores, error = decompose.ttm_svd(matrix, 10_000, out_modes, in_modes)
    assert [tuple(c.shape[1:3]) for c in cores] == list(zip(out_modes, in_modes, strict=True))
    assert relative(matrix_ring(cores), matrix) < 1e-12
    assert error < 1e-12
    cores, error = decompose.ttm_svd(matrix, 2, out_modes, in_modes)
    assert error == pytest.approx(relative(matrix_ring(cores), matrix), rel=1e-9, abs=1e-14)


def test_ttm_entries_follow_the_formula():
    cores, _ = decompose.ttm_svd(random(6, 20), 3, (2, 3), (4, 5))
    dense = matrix_ring(cores)
    for o1, o2, i1, i2 in [(0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 1)]:
        entry = cores[0][0, o1, i1] @ cores[1][:, o2, i2, 0]
        assert float(dense[3 * o1 + o2, 5 * i1 + i2]) == pytest.approx(float(entry), rel=1e-12)


@pytest.mark.parametrize("ranks", [(2, 3, 2), (4, 6, 3)])
def test_agrees_with_tensorly(ranks):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train

    tensor = random(4, 5, 6, 3)
    theirs = tensor_train(tensorly.tensor(tensor.numpy()), rank=[1, *ranks, 1])
    dense = ring([torch.from_numpy(np.array(core)) for core in theirs])
    assert relative(ring(decompose.tt_svd(tensor, ranks).cores), dense) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_strides_and_gradients(dtype):
    tensor = random(4, 5, 6).to(dtype)
    view = torch.stack([tensor, tensor], dim=-1)[..., 0].requires_grad_()
    plain, strided = decompose.tt_svd(tensor, 3), decompose.tt_svd(view, 3)
    for core, other in zip(plain.cores, strided.cores, strict=True):
        assert core.dtype == dtype
        assert core.is_contiguous()
        assert not other.requires_grad
        assert torch.equal(core, other)
    assert plain.relative_error == strided.relative_error


def test_zero_tensor():
    cores, error = decompose.tt_svd(torch.zeros(3, 4, 5), 2)
    assert error == 0.0
    assert not ring(cores).any()


class TestBadInput:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite(self, value):
        tensor = random(4, 6)
        tensor[1, 2] = value
        with pytest.raises(ValueError, match="tt_svd: tensor contains NaN or Inf"):
            decompose.tt_svd(tensor, 2)
        with pytest.raises(ValueError, match="ttm_svd: matrix contains NaN or Inf"):
            decompose.ttm_svd(tensor, 2, (2, 2), (3, 2))

    @pytest.mark.parametrize("ranks", [0, (2, 0), (2,), (2, 2, 2), (2, 2, 2, 1), (1, 2, 2, 2)])
    def test_wrong_ranks(self, ranks):
        with pytest.raises(ValueError, match="tt_svd: ranks must be"):
            decompose.tt_svd(random(3, 4, 5), ranks)

    @pytest.mark.parametrize("ranks", [True, 2.5, (2, 3.0), "3", (2, True), None])
    def test_ranks_of_wrong_type(self, ranks):
        with pytest.raises(TypeError, match="tt_svd: ranks must be an int"):
            decompose.tt_svd(random(3, 4, 5), ranks)

    def test_modes(self):
        with pytest.raises(ValueError, match=r"ttm_svd: out_modes must multiply to 12, got \(3, 5\)"):
            decompose.ttm_svd(random(12, 10), 2, (3, 5), (2, 5))
        with pytest.raises(ValueError, match=r"ttm_svd: in_modes must be at least 1, got -2"):
            decompose.ttm_svd(random(12, 10), 2, (3, 4), (-2, -5))
        with pytest.raises(ValueError, match="as many out_modes as in_modes"):
            decompose.ttm_svd(random(12, 10), 2, (3, 4), (10,))

    def test_failed_svd_is_reported(self, monkeypatch):
        monkeypatch.setattr(svd_module, "_SVD_DRIVERS", ())
        with pytest.raises(decompose.DecompositionError, match="did not converge"):
            decompose.tt_svd(random(3, 4, 5), 2)


def test_no_float64_copy_of_a_large_tensor():
    script = """
        import resource, torch
        from tensorcomp_ext import decompose
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # As large a block and the same route: what libraries keep for themselves is no copy of the tensor.
        decompose.tt_svd(torch.randn(64, 40, 40, 40), 4)
        tensor = torch.randn(64, 80, 80, 80)
        before = peak()
        decompose.tt_svd(tensor, 4)
        print(peak() - before, tensor.numel())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    growth, numel = map(int, run.stdout.split())
    assert growth < 0.5 * 8 * numel
