"""Spectra and truncation of factors against those of the dense weight."""

import math

import pytest
import torch

from tensorcomp_ext.formats import CP, SVD, Tucker2
from tensorcomp_ext.ranks import Orthogonal, rank_layout
from tensorcomp_ext.ranks.shared_energy import Subject, share_energy

SHAPES = [
    ((7, 5, 3, 3), (4, 3)),
    ((6, 9, 3), (6, 9)),
    ((4, 3, 1, 1), (3, 3)),
    ((12, 2, 2, 3, 2), (9, 1)),
    ((5, 8, 3, 3), (1, 1)),
    ((5, 7), 4),
    ((9, 6), 1),
    ((6, 6), 6),
]


def made(shape, rank, dtype=torch.float64):
    torch.manual_seed(3)
    cls = SVD if len(shape) == 2 else Tucker2
    return cls.random(shape, rank, dtype=dtype)


def unfoldings(weight):
    dense = weight.to_dense().detach().double()
    modes = (0,) if dense.dim() == 2 else (0, 1)
    return [dense.movedim(mode, 0).flatten(1) for mode in modes]


@pytest.mark.parametrize("shape,rank", SHAPES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_spectra_are_those_of_the_dense_weight(shape, rank, dtype, tolerance):
    weight = made(shape, rank, dtype)
    for found, matrix in zip(Orthogonal(weight).spectra, unfoldings(weight), strict=True):
        expected = torch.linalg.svdvals(matrix)
        assert found.dtype == torch.float64 and found.device.type == "cpu"
        torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=tolerance * expected[0].item())
        assert (expected[len(found) :] <= tolerance * expected[0]).all()


@pytest.mark.parametrize("shape,rank", SHAPES)
def test_nothing_is_lost_at_the_ranks_there_are(shape, rank):
    weight = made(shape, rank)
    orthogonal = Orthogonal(weight)
    again = orthogonal.truncated([len(values) for values in orthogonal.spectra])
    assert type(again) is type(weight) and again.shape == weight.shape
    torch.testing.assert_close(again.to_dense(), weight.to_dense(), rtol=0, atol=1e-12)


def test_a_matrix_is_truncated_to_its_best_approximation():
    weight = made((9, 7), 6)
    u, s, vh = torch.linalg.svd(weight.to_dense().detach(), full_matrices=False)
    found = Orthogonal(weight).truncated([2])
    torch.testing.assert_close(found.to_dense().detach(), (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.b @ found.b.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [(2, 3), (4, 1), (1, 1)])
def test_a_kernel_is_truncated_as_hosvd_does(ranks):
    weight = made((8, 6, 3, 3), (5, 4))
    dense = weight.to_dense().detach()
    found = Orthogonal(weight).truncated(ranks)
    assert found.rank == ranks
    bases = [torch.linalg.svd(m)[0][:, :r] for m, r in zip(unfoldings(weight), ranks, strict=True)]
    expected = dense
    for mode, basis in enumerate(bases):
        projected = basis @ basis.T @ expected.movedim(mode, 0).flatten(1)
        expected = projected.reshape(expected.movedim(mode, 0).shape).movedim(0, mode)
    torch.testing.assert_close(found.to_dense().detach(), expected, rtol=0, atol=1e-12)
    lost = sum(
        torch.linalg.svdvals(m)[r:].square().sum() for m, r in zip(unfoldings(weight), ranks, strict=True)
    )
    assert (found.to_dense() - dense).square().sum() <= lost * (1 + 1e-12)
    for factor in (found.factor_out, found.factor_in):
        gram = (factor.T @ factor).detach()
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-12)


def test_zero_factors_have_zero_spectra():
    weight = made((6, 5, 3, 3), (3, 2))
    with torch.no_grad():
        weight.factor_out.zero_()
    orthogonal = Orthogonal(weight)
    assert all(not values.any() for values in orthogonal.spectra)
    assert not orthogonal.truncated((1, 1)).to_dense().any()


@pytest.mark.parametrize("budget", [150, 260, 400])
def test_ranks_are_chosen_as_for_the_dense_weights(budget):
    weights = {"kernel": made((8, 6, 3, 3), (6, 5)), "matrix": made((9, 12), 8)}
    layouts = {name: Orthogonal(weight).layout for name, weight in weights.items()}
    dense = {name: rank_layout(weight.to_dense().detach(), weight.name) for name, weight in weights.items()}
    found, expected = (
        share_energy({n: Subject(layout, layout.params, math.inf) for n, layout in some.items()}, budget)
        for some in (layouts, dense)
    )
    assert found.ranks == expected.ranks and found.cost == expected.cost <= budget
    for name, weight in weights.items():
        assert layouts[name].limits == (weight.rank if isinstance(weight.rank, tuple) else (weight.rank,))
        cut = Orthogonal(weight).truncated(found.ranks[name])
        assert layouts[name].params(found.ranks[name]) == cut.numel


def test_refusals():
    weight = made((6, 5, 3, 3), (3, 2))
    with pytest.raises(TypeError, match="tucker2 or svd, got 'cp'"):
        Orthogonal(CP.random((6, 5, 3, 3), 2))
    for ranks in ((0, 1), (4, 1), (1,), (1, 3)):
        with pytest.raises(ValueError, match=r"ranks must be from 1 to \[3, 2\] each"):
            Orthogonal(weight).truncated(ranks)
    with torch.no_grad():
        weight.core[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the factors of tucker2 must be finite"):
        Orthogonal(weight)
