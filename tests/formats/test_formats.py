"""Formats: entries against an index-by-index sum, counts, initialisation, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from tensorcomp_ext.formats import SVD, Tucker2, format_names, get_format
from tensorcomp_ext.formats.base import register_format

SHAPES = [(5, 4, 3), (7, 3, 3, 2), (3, 6, 1, 1), (4, 5, 2, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [(1, 1), (3, 2), (2, 3)])
def test_tucker2_entries(shape: tuple[int, ...], rank: tuple[int, int]) -> None:
    weight = Tucker2.random(shape, rank, dtype=torch.float64)
    core, u_out, u_in = weight.core, weight.factor_out, weight.factor_in
    expected = torch.zeros(shape, dtype=torch.float64)
    for index in itertools.product(*map(range, shape)):
        t, s, *k = index
        for b, a in itertools.product(range(rank[0]), range(rank[1])):
            expected[index] += u_out[t, b].detach() * core[(b, a, *k)].detach() * u_in[s, a].detach()
    assert weight.shape == torch.Size(shape)
    assert weight.rank == rank
    torch.testing.assert_close(weight.to_dense().detach(), expected, rtol=0, atol=1e-13)


def test_svd_entries() -> None:
    weight = SVD.random((5, 7), 3, dtype=torch.float64)
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for o, i, r in itertools.product(range(5), range(7), range(3)):
        expected[o, i] += weight.a[o, r].detach() * weight.b[r, i].detach()
    torch.testing.assert_close(weight.to_dense().detach(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape,rank", [((4, 3, 2, 2), (2, 3)), ((3, 4, 3), (3, 1)), ((5, 4), 2)])
def test_to_dense_gradients(shape: tuple[int, ...], rank: int | tuple[int, int]) -> None:
    cls = SVD if len(shape) == 2 else Tucker2
    weight = cls.random(shape, rank, dtype=torch.float64)
    names = weight.factor_names
    assert gradcheck(
        lambda *f: torch.func.functional_call(weight, dict(zip(names, f, strict=True))), weight.factors
    )


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 6, 3), (3, 4, 2, 2, 2)])
def test_full_rank_is_exact(shape: tuple[int, ...]) -> None:
    dense = torch.randn(shape, dtype=torch.float64)
    made = Tucker2.from_dense(dense, shape[:2])
    assert (made.to_dense() - dense).norm() <= 1e-12 * dense.norm()
    matrix = dense.flatten(1)
    assert (SVD.from_dense(matrix, min(matrix.shape)).to_dense() - matrix).norm() <= 1e-12 * matrix.norm()


def test_planted_rank_is_recovered() -> None:
    dense = Tucker2.random((12, 10, 3, 3), (4, 3), dtype=torch.float64).to_dense().detach()
    assert (Tucker2.from_dense(dense, (4, 3)).to_dense() - dense).norm() <= 1e-12 * dense.norm()


@pytest.mark.parametrize(
    ("shape", "rank_in", "rank_out", "stored"),
    [
        ((256, 256), 168, 176, 354_176),
        ((256, 256), 144, 141, 255_696),
        ((512, 256), 194, 275, 670_614),
        ((512, 256), 222, 299, 807_322),
        ((512, 512), 332, 328, 1_317_984),
        ((512, 512), 292, 212, 815_184),
        ((512, 512), 348, 342, 1_424_424),
        ((512, 512), 160, 69, 216_608),
        ((512, 512), 382, 392, 1_743_984),
        ((512, 512), 31, 39, 46_721),
    ],
)
def test_published_counts(shape: tuple[int, int], rank_in: int, rank_out: int, stored: int) -> None:
    weight = Tucker2.empty((*shape, 3, 3), (rank_out, rank_in), device="meta")
    assert weight.numel == stored
    in_positions, out_positions = 30 * 28, 15 * 14
    macs = in_positions * shape[1] * rank_in + out_positions * (9 * rank_in * rank_out + rank_out * shape[0])
    assert weight.macs(in_positions, out_positions) == macs
    assert weight.flops(in_positions, out_positions) == 2 * macs
    assert weight.dense_macs(out_positions) == out_positions * 9 * shape[0] * shape[1]


def test_svd_counts() -> None:
    weight = SVD.empty((320, 1250), 20, device="meta")
    assert weight.numel == 20 * (320 + 1250)
    assert weight.macs(7, 7) == 7 * weight.numel


@pytest.mark.parametrize("shape,rank", [((50, 20, 5, 5), (25, 18)), ((400, 300), 40)])
def test_random_variance(shape: tuple[int, ...], rank: int | tuple[int, int]) -> None:
    cls = SVD if len(shape) == 2 else Tucker2
    fan_in = torch.Size(shape[1:]).numel()
    drawn = torch.stack([cls.random(shape, rank, dtype=torch.float64).to_dense().detach() for _ in range(8)])
    assert drawn.var().item() == pytest.approx(2 / fan_in, rel=0.1)
    small = torch.stack(
        [cls.random(shape, rank, 1e-4, dtype=torch.float64).to_dense().detach() for _ in range(8)]
    )
    assert small.var().item() == pytest.approx(1e-4, rel=0.1)


def test_generator_repeats() -> None:
    first, second = (
        Tucker2.random((4, 4, 3, 3), 2, generator=torch.Generator().manual_seed(3)).to_dense()
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("rank", [0, -1, (0, 3), (3, -2)])
def test_rank_below_one(rank: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Tucker2.random((8, 8, 3, 3), rank)


def test_rank_above_mode_is_clipped() -> None:
    with pytest.warns(UserWarning, match="R_out=20 is clipped to 8"):
        assert Tucker2.random((8, 6, 3, 3), (20, 3)).rank == (8, 3)
    with pytest.warns(UserWarning, match="R=9 is clipped to 4"):
        assert SVD.random((8, 4), 9).rank == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_is_refused(value: float) -> None:
    dense = torch.randn(5, 4, 3, 3)
    dense[2, 1, 0, 0] = value
    with pytest.raises(ValueError):
        Tucker2.from_dense(dense, 2)
    with pytest.raises(ValueError):
        SVD.from_dense(dense.flatten(1), 2)


def test_misfit_factors_are_named() -> None:
    core = torch.randn(3, 2, 3, 3)
    with pytest.raises(ValueError, match=r"factor_out must be \[T, R_out\] with R_out = 3, got \[5, 2\]"):
        Tucker2(core, torch.randn(5, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"factor_in must be .* R_in = 2, got \[4, 3\]"):
        Tucker2(core, torch.randn(5, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"b must be \[R, N\] with R = 3"):
        SVD(torch.randn(5, 3), torch.randn(2, 4))
    with pytest.raises(TypeError, match="floating"):
        SVD(torch.ones(5, 3, dtype=torch.int64), torch.randn(3, 4))


def test_registry() -> None:
    assert get_format("tucker2") is Tucker2
    assert "svd" in format_names("linear")
    assert "svd" not in format_names("conv")
    with pytest.raises(ValueError, match=r"one of \[.*'tucker2'.*\] for conv layers, got 'svd'"):
        get_format("svd", "conv")
    with pytest.raises(ValueError, match="is taken by Tucker2"):
        register_format("tucker2")(SVD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    made = Tucker2.from_dense(torch.randn(6, 5, 3, 3).to(dtype), (3, 2))
    assert {factor.dtype for factor in made.factors} == {dtype}
