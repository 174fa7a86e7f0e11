"""Tucker in all modes: exactness, the HOSVD bound, HOOI no worse, planted ranks, tensorly, bad input."""

import warnings

import pytest
import torch
from planted import random, relative

from tensorcomp_ext import decompose


def rebuild(core, factors):
    for mode, factor in enumerate(factors):
        core = torch.tensordot(factor, core, dims=([1], [mode])).movedim(0, mode)
    return core


@pytest.mark.parametrize("sizes", [(7,), (5, 6), (4, 5, 6), (3, 1, 4, 2)])
@pytest.mark.parametrize("method", ["hooi", "hosvd"])
def test_full_rank_is_exact(sizes, method):
    tensor = random(*sizes)
    core, factors, error = decompose.tucker(tensor, sizes, method=method)
    assert relative(rebuild(core, factors), tensor) < 1e-12
    assert error < 1e-12


@pytest.mark.parametrize("ranks", [(2, 3, 2), (4, 2, 6), (1, 1, 1), (4, 5, 3)])
def test_hosvd_is_within_the_tails_and_hooi_no_worse(ranks):
    tensor = random(4, 5, 6)
    hosvd, hooi = (decompose.tucker(tensor, ranks, method=method) for method in ("hosvd", "hooi"))
    bound = 0.0
    for mode, rank in enumerate(ranks):
        energy = torch.linalg.svdvals(decompose.unfold(tensor, mode)) ** 2
        bound += float(energy[rank:].sum() / energy.sum())
    assert hosvd.relative_error**2 <= bound * (1 + 1e-12)
    assert hooi.relative_error <= hosvd.relative_error * (1 + 1e-12)
    for found in (hosvd, hooi):
        assert found.relative_error == pytest.approx(relative(rebuild(*found[:2]), tensor), rel=1e-9)
        for factor in found.factors:
            eye = torch.eye(factor.shape[1], dtype=torch.float64)
            assert torch.allclose(factor.T @ factor, eye, atol=1e-12)


def test_planted_ranks_are_recovered():
    tensor = rebuild(random(2, 3, 2), [random(n, r, seed=n) for n, r in ((7, 2), (8, 3), (9, 2))])
    assert decompose.tucker(tensor, (2, 3, 2)).relative_error < 1e-12


def test_no_worse_than_tensorly():
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tucker

    tensor = random(6, 7, 8)
    core, factors = tucker(tensorly.tensor(tensor.numpy()), rank=[3, 2, 4], init="svd", tol=1e-9)
    theirs = rebuild(torch.tensor(core), [torch.tensor(factor.copy()) for factor in factors])
    ours = decompose.tucker(tensor, (3, 2, 4)).relative_error
    assert ours <= relative(theirs, tensor) * (1 + 1e-4)


def test_ranks_and_dtype():
    tensor = random(4, 5, 6, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decompose.tucker(tensor, 5).core.shape == (4, 5, 5)  # an int is a bound
    with pytest.warns(UserWarning, match=r"tucker: ranks\[0\] 9 exceeds 4; clipped to 4") as record:
        found = decompose.tucker(tensor, (9, 2, 2))
    assert record[0].filename == __file__
    assert {part.dtype for part in (found.core, *found.factors)} == {torch.float32}
    with pytest.warns(UserWarning, match="tucker: ranks 9 exceeds 6; clipped to 6"):
        decompose.tucker(tensor, 9)


def test_bad_input():
    tensor = random(4, 5, 6)
    for arguments, message in (
        (((2, 2),), "tucker: ranks must be an int or 3 ranks"),
        ((0,), "tucker: ranks must be at least 1"),
        (((2, -1, 2),), r"tucker: ranks\[1\] must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            decompose.tucker(tensor, *arguments)
    with pytest.raises(ValueError, match="method must be 'hooi' or 'hosvd', got 'als'"):
        decompose.tucker(tensor, 2, method="als")
    tensor[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="tucker: tensor contains NaN or Inf"):
        decompose.tucker(tensor, 2)
