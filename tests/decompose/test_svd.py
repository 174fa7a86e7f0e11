"""Singular values and truncated SVD against LAPACK, on the direct and on the Gram-matrix route."""

import pytest
import torch

from tensorcomp_ext import decompose
from tensorcomp_ext.decompose import svd as svd_module
from tensorcomp_ext.decompose.unfolding import _blocks, expand, gram, project


@pytest.fixture(params=["direct", "gram"])
def route(request, monkeypatch):
    """Run a test twice: as small matrices go, and with every matrix treated as a large one."""
    if request.param == "gram":
        monkeypatch.setattr(svd_module, "DENSE_SVD_WORK", 0)
        monkeypatch.setattr("tensorcomp_ext.decompose.unfolding.BLOCK_ELEMENTS", 100)
    return request.param


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (5, 17), (31, 12), (16, 16), (3, 200)])
def test_full_rank_is_exact(shape, route):
    matrix = random(*shape)
    u, s, vh = decompose.truncated_svd(matrix, min(shape))
    assert relative(u * s @ vh, matrix) < 1e-12
    eye = torch.eye(min(shape), dtype=torch.float64)
    assert torch.allclose(u.T @ u, eye, atol=1e-12)
    assert torch.allclose(vh @ vh.T, eye, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 17), (31, 12), (16, 16), (40, 300)])
def test_truncation_is_the_best_one(shape, route):
    matrix = random(*shape)
    exact = torch.linalg.svdvals(matrix)
    rank = 4
    u, s, vh = decompose.truncated_svd(matrix, rank)
    assert torch.allclose(s, exact[:rank], rtol=1e-12)
    assert (matrix - u * s @ vh).norm() == pytest.approx(float(exact[rank:].norm()), rel=1e-10)


@pytest.mark.parametrize("shape", [(6, 50), (50, 6), (23, 23)])
def test_singular_values(shape, route):
    values = decompose.singular_values(random(*shape, dtype=torch.float32))
    exact = torch.linalg.svdvals(random(*shape, dtype=torch.float32).double())
    assert values.dtype == torch.float64
    assert torch.allclose(values, exact, rtol=1e-10)


@pytest.mark.parametrize("mode", [0, 1, 2, -1])
@pytest.mark.parametrize("shape", [(5, 6, 7), (40, 2, 3), (2, 30, 4)])
def test_singular_values_of_an_unfolding(shape, mode, route):
    tensor = random(*shape)
    exact = torch.linalg.svdvals(decompose.unfold(tensor, mode))
    assert torch.allclose(decompose.singular_values(tensor, mode), exact, rtol=1e-10)
    with pytest.raises(ValueError, match="mode must be in"):
        decompose.singular_values(tensor, 3)


def test_dead_channels_give_zero_on_the_gram_route(monkeypatch):
    monkeypatch.setattr(svd_module, "DENSE_SVD_WORK", 0)
    matrix = random(12, 100)
    matrix[3] = 0.0
    matrix[7] = matrix[2]
    assert int((decompose.singular_values(matrix) == 0.0).sum()) == 2


def test_planted_rank_survives_the_gram_route(route):
    matrix = random(40, 6) @ torch.diag(10.0 ** -torch.arange(6.0)).double() @ random(6, 90, seed=1)
    u, s, vh = decompose.truncated_svd(matrix, 10)  # four of the ten values are zero
    assert relative(u * s @ vh, matrix) < 1e-10
    assert torch.allclose(u.T @ u, torch.eye(10, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_matrix(dtype):
    matrix = random(9, 13).to(dtype)
    assert {part.dtype for part in decompose.truncated_svd(matrix, 3)} == {dtype}
    factors = decompose.svd_factors(matrix, 9)
    assert (factors.a.dtype, factors.b.dtype) == (dtype, dtype)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_factors(rank, route):
    weight = random(12, 31)
    a, b, error = decompose.svd_factors(weight, rank)
    assert (a.shape, b.shape) == ((12, rank), (rank, 31))
    assert torch.allclose(b @ b.T, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    assert error == pytest.approx(relative(a @ b, weight), rel=1e-6, abs=1e-13)


def test_svd_factors_report_tiny_errors_and_zero_weights(route):
    weight = random(20, 3) @ random(3, 30, seed=1)
    perturbed = weight + 1e-9 * random(20, 30, seed=2)
    a, b, error = decompose.svd_factors(perturbed, 3)
    # The difference of the squared norms could not tell this from zero.
    assert error == pytest.approx(relative(a @ b, perturbed), rel=1e-3)
    assert decompose.svd_factors(torch.zeros(4, 5), 2).relative_error == 0.0


def test_strided_and_gradient_carrying_input():
    weight = random(30, 40).requires_grad_()
    view = weight[::2, 1::3]
    u, s, vh = decompose.truncated_svd(view, 13)
    assert not u.requires_grad
    assert relative(u * s @ vh, view.detach()) < 1e-12


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_blockwise_products_match_einsum(mode, monkeypatch):
    monkeypatch.setattr("tensorcomp_ext.decompose.unfolding.BLOCK_ELEMENTS", 20)
    tensor = random(5, 7, 6, dtype=torch.float32)
    matrix = decompose.unfold(tensor, mode).double()
    assert len(list(_blocks(tensor, mode))) > 1
    assert torch.allclose(gram(tensor, mode), (matrix @ matrix.T).triu(), atol=1e-12)
    factor = random(tensor.shape[mode], 3)
    reduced = project(tensor, mode, factor)
    assert torch.allclose(decompose.unfold(reduced, mode), factor.T @ matrix, atol=1e-12)
    back = expand(reduced, mode, factor)
    assert torch.allclose(decompose.unfold(back, mode), factor @ factor.T @ matrix, atol=1e-12)


def test_unfold_has_the_column_order_of_tensorly():
    tensorly = pytest.importorskip("tensorly")
    tensor = random(2, 3, 4, 5)
    for mode in range(4):
        expected = torch.from_numpy(tensorly.unfold(tensor.numpy(), mode))
        assert torch.equal(decompose.unfold(tensor, mode), expected)
    assert torch.equal(decompose.unfold(tensor, -1), decompose.unfold(tensor, 3))
    with pytest.raises(ValueError, match="mode must be in"):
        decompose.unfold(tensor, 4)


class TestLadder:
    @staticmethod
    def _fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    @staticmethod
    def _nan(matrix):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s * float("nan"), vh

    @pytest.mark.parametrize("shape", [(8, 13), (13, 8)])
    @pytest.mark.parametrize("broken", [1, 2])
    def test_next_driver_takes_over(self, monkeypatch, shape, broken):
        rest = svd_module._SVD_DRIVERS[broken:]
        monkeypatch.setattr(svd_module, "_SVD_DRIVERS", (self._fail, self._nan)[:broken] + rest)
        matrix = random(*shape)
        u, s, vh = decompose.truncated_svd(matrix, 8)
        assert relative(u * s @ vh, matrix) < 1e-12
        assert torch.allclose(s, torch.linalg.svdvals(matrix), rtol=1e-10)

    def test_error_names_size_and_every_attempt(self, monkeypatch):
        monkeypatch.setattr(svd_module, "_SVD_DRIVERS", (self._fail, self._nan))
        with pytest.raises(
            decompose.DecompositionError, match=r"8 x 13 .*did not converge.*nan: returned NaN"
        ):
            decompose.truncated_svd(random(8, 13), 2)

    def test_eigh_retries_with_a_rebuilt_matrix(self, monkeypatch):
        import numpy as np
        import scipy.linalg

        original, drivers = scipy.linalg.eigh, []

        def flaky(matrix, **kwargs):
            drivers.append(kwargs["driver"])
            if len(drivers) == 1:
                matrix[:] = 0.0
                raise np.linalg.LinAlgError("no convergence")
            return original(matrix, **kwargs)

        monkeypatch.setattr(scipy.linalg, "eigh", flaky)
        monkeypatch.setattr(svd_module, "DENSE_SVD_WORK", 0)
        matrix = random(6, 11)
        u, s, vh = decompose.truncated_svd(matrix, 6)
        assert drivers == ["evr", "ev"]
        assert relative(u * s @ vh, matrix) < 1e-12


class TestBadInput:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("call", [decompose.singular_values, lambda m: decompose.truncated_svd(m, 1)])
    def test_non_finite(self, value, call):
        matrix = random(4, 5)
        matrix[2, 3] = value
        with pytest.raises(ValueError, match="contains NaN or Inf"):
            call(matrix)

    @pytest.mark.parametrize("rank", [0, -3])
    def test_rank_below_one(self, rank):
        with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
            decompose.svd_factors(random(4, 5), rank)

    @pytest.mark.parametrize("rank", [2.0, True, "2"])
    def test_rank_of_wrong_type(self, rank):
        with pytest.raises(TypeError, match="rank must be an int"):
            decompose.svd_factors(random(4, 5), rank)

    def test_rank_above_the_size_is_clipped_with_a_warning(self):
        with pytest.warns(UserWarning, match="rank 9 exceeds 4; clipped to 4") as record:
            factors = decompose.svd_factors(random(4, 5), 9)
        assert factors.a.shape == (4, 4)
        assert record[0].filename == __file__

    def test_shape_and_dtype(self):
        with pytest.raises(ValueError, match=r"must have 2 dimensions, got shape \[2, 3, 4\]"):
            decompose.truncated_svd(random(2, 3, 4), 1)
        with pytest.raises(ValueError, match="must not be empty"):
            decompose.singular_values(torch.zeros(0, 4))
        with pytest.raises(TypeError, match=r"real floating-point, got torch\.int64"):
            decompose.singular_values(torch.ones(3, 4, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
            decompose.singular_values([[1.0]])
