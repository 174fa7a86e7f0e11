"""Modes and ranks of folded formats: defaults, clipping, refusals."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch

from tensorcomp_ext.formats import (
    CP,
    SVD,
    TR,
    TT,
    TTM,
    TRMatrix,
    Tucker,
    Tucker2,
    balanced_modes,
    covering_modes,
    format_names,
)


@pytest.mark.parametrize("size", [1, 2, 7, 9, 60, 320, 768, 769, 1250, 3072, 4096, 11008])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_balanced_modes(size: int, count: int) -> None:
    modes = balanced_modes(size, count)
    assert math.prod(modes) == size and len(modes) == count and list(modes) == sorted(modes)


def test_balanced_modes_are_balanced() -> None:
    assert balanced_modes(4096, 3) == (16, 16, 16)
    assert balanced_modes(768, 3) == (8, 8, 12)
    assert balanced_modes(3072, 3) == (12, 16, 16)
    assert balanced_modes(11008, 2) == (86, 128)


@pytest.mark.parametrize("size", [1, 2, 17, 1000, 17_200, 30_522, 32_768, 50_257])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_covering_modes(size: int, count: int) -> None:
    modes = covering_modes(size, count)
    assert size <= math.prod(modes) and len(modes) == count
    assert math.prod(modes) <= size * (1 + 1 / min(modes)) ** count
    assert max(modes) - min(modes) <= 1


def test_default_foldings() -> None:
    def modes(cls: Any, shape: tuple[int, ...], **options: Any) -> Any:
        weight = cls.empty(shape, 2, device="meta", **options)
        return weight.structure["out_modes"], weight.structure["in_modes"]

    assert modes(TT, (3072, 768)) == ([12, 16, 16], [8, 8, 12])
    assert modes(TR, (7, 14)) == ([7], [2, 7])
    assert modes(Tucker, (3072, 768)) == modes(CP, (3072, 768)) == ([48, 64], [24, 32])
    assert modes(TTM, (9, 7)) == ([3, 3], [1, 7])
    assert modes(TRMatrix, (64, 30), in_modes=(5, 6)) == ([8, 8], [5, 6])
    for cls in (TT, TR, TTM, CP, Tucker):
        assert modes(cls, (12, 8, 3, 3)) == ([12], [8])
    assert modes(TTM, (12, 8, 3), out_modes=(3, 4), in_modes=(2, 4)) == ([3, 4], [2, 4])


def test_input_order_is_that_of_a_flattened_image() -> None:
    """Modes (height, width, channels) of an image that torch flattens channels first."""
    height, width, channels = 2, 3, 4
    dense = torch.randn(6, channels * height * width, dtype=torch.float64)
    options: dict[str, Any] = {"out_modes": (6,), "in_modes": (height, width, 2, 2)}
    ordered = TT.from_dense(dense, 99_999, input_order=(2, 3, 0, 1), **options)
    by_hand = dense.unflatten(1, (channels, height, width)).permute(0, 2, 3, 1).flatten(1)
    plain = TT.from_dense(by_hand, 99_999, **options)
    for ours, theirs in zip(ordered.factors, plain.factors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(ordered.to_dense().detach(), dense, rtol=0, atol=1e-12)


pytestmark = pytest.mark.filterwarnings("ignore:.*rank=99999 is clipped to")


def test_ranks_as_users_write_them() -> None:
    modes: dict[str, Any] = {"out_modes": (4, 5), "in_modes": (6, 7)}
    assert TT.check_rank((20, 42), (2, 3, 4), **modes) == (2, 3, 4)
    assert TT.check_rank((20, 42), (1, 2, 3, 4, 1), **modes) == (2, 3, 4)
    assert TT.check_rank((20, 42), [2, 3, 4], **modes) == (2, 3, 4)
    assert TR.check_rank((20, 42), (2, 3, 4, 5, 2), **modes) == (2, 3, 4, 5)
    assert TR.check_rank((20, 42), 3, **modes) == (3, 3, 3, 3)
    assert TTM.check_rank((20, 42), (1, 3, 1), **modes) == TTM.check_rank((20, 42), 3, **modes) == (3,)
    assert TRMatrix.check_rank((20, 42), (3, 2, 3), **modes) == (3, 2)
    assert CP.check_rank((20, 42), (9,), **modes) == CP.check_rank((20, 42), 9, **modes) == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an int is the most that each may be: modes may ask for less
        assert TT.check_rank((20, 42), 18, **modes) == (4, 18, 7)
        assert Tucker.check_rank((20, 42), 6, **modes) == (4, 5, 6, 6)
        assert Tucker.check_rank((20, 42, 3, 3), 6) == (6, 6, 3, 3)


def test_ranks_are_clipped_with_a_warning() -> None:
    modes: dict[str, Any] = {"out_modes": (4, 5), "in_modes": (6, 7)}
    with pytest.warns(UserWarning, match="tt: R_0=9 is clipped to 4, the largest useful one"):
        assert TT.check_rank((20, 42), (9, 3, 4), **modes) == (4, 3, 4)
    with pytest.warns(UserWarning, match="tt: rank=99 is clipped to 20"):
        assert TT.check_rank((20, 42), 99, **modes) == (4, 20, 7)
    with pytest.warns(UserWarning, match="cp: rank=999 is clipped to 120"):
        assert CP.check_rank((20, 42), 999, **modes) == 120
    with pytest.warns(UserWarning, match="tr_matrix: rank=9 is clipped to 1"):
        assert TRMatrix.check_rank((4, 5), 9, out_modes=(4,), in_modes=(5,)) == (1,)


@pytest.mark.parametrize("cls", [TT, TR, TTM, TRMatrix, CP, Tucker])
def test_bad_ranks(cls: Any) -> None:
    for rank in (0, -3):
        with pytest.raises(ValueError, match="rank must be at least 1"):
            cls.check_rank((12, 20), rank)
    with pytest.raises(ValueError, match="must be an int or"):
        cls.check_rank((12, 20), (2,) * 11)
    with pytest.raises(TypeError, match="rank must be an int"):
        cls.check_rank((12, 20), 2.5)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"tt: out_modes must have the product 12, got \[3, 5\] \(15\)"):
        TT.empty((12, 20), 2, out_modes=(3, 5))
    with pytest.raises(ValueError, match=r"ttm: out_modes must have the product at least 12, got \[3, 3\]"):
        TTM.empty((12, 20), 2, out_modes=(3, 3))
    with pytest.raises(ValueError, match=r"tr: in_modes must be a tuple of ints >= 1, .* got \(0, 20\)"):
        TR.empty((12, 20), 2, in_modes=(0, 20))
    with pytest.raises(ValueError, match=r"tt: input_order must be a permutation of \[0, 1\], got \[0, 0\]"):
        TT.empty((12, 20), 2, in_modes=(4, 5), input_order=(0, 0))
    with pytest.raises(ValueError, match="tt: input_order is for matrices"):
        TT.empty((12, 20, 3, 3), 2, in_modes=(4, 5), input_order=(1, 0))
    with pytest.raises(ValueError, match="ttm: out_modes and in_modes must be as many"):
        TTM.empty((12, 20), 2, out_modes=(3, 4), in_modes=(20,))
    with pytest.raises(ValueError, match=r"tr_matrix: shape must be \[M, N\]"):
        TRMatrix.empty((12, 20, 3), 2)
    with pytest.raises(ValueError, match="at most 20 modes"):
        TT.empty((12, 20), 2, in_modes=(1,) * 20 + (20,))
    with pytest.raises(TypeError, match="tt: unknown option 'restarts'"):
        TT.from_dense(torch.randn(12, 20), 2, restarts=3)
    with pytest.raises(TypeError, match="svd: takes no option 'in_modes'"):
        SVD.empty((12, 20), 2, in_modes=(4, 5))
    with pytest.raises(TypeError, match="tucker2: takes no option 'seed'"):
        Tucker2.from_dense(torch.randn(12, 20, 3, 3), 2, seed=1)


def test_misfit_cores_are_named() -> None:
    good = [torch.randn(1, 12, 4), torch.randn(4, 20, 1)]
    modes: dict[str, Any] = {"out_modes": (12,), "in_modes": (20,)}
    assert TT(good, (12, 20), **modes).rank == (4,)
    with pytest.raises(ValueError, match=r"tt: core_1 must be \[R, 20, 1\] with R = 4, got \[3, 20, 1\]"):
        TT([good[0], torch.randn(3, 20, 1)], (12, 20), **modes)
    with pytest.raises(ValueError, match="tt: expected the factors core_0, core_1, got 1"):
        TT(good[:1], (12, 20), **modes)
    with pytest.raises(TypeError, match="tt: core_0 must be of a floating dtype"):
        TT([good[0].long(), good[1]], (12, 20), **modes)
    ring = [torch.randn(2, 12, 4), torch.randn(4, 20, 3)]
    with pytest.raises(ValueError, match=r"core_1 must be \[R_1, 20, R_0\] with R_1 = 4 and R_0 = 2"):
        TR(ring, (12, 20), **modes)


@pytest.mark.parametrize("name", ["nan", "inf"])
@pytest.mark.parametrize("cls", [TT, TR, TTM, TRMatrix, CP, Tucker])
def test_non_finite_is_refused(cls: Any, name: str) -> None:
    dense = torch.randn(6, 8)
    dense[2, 1] = float(name)
    with pytest.raises(ValueError, match="NaN or Inf"):
        cls.from_dense(dense, 2)


@pytest.mark.parametrize("cls", [TT, TR, TTM, TRMatrix, CP, Tucker])
def test_dtype_copies_and_pickles(cls: Any) -> None:
    weight = cls.from_dense(torch.randn(12, 20).bfloat16(), 2)
    assert {factor.dtype for factor in weight.factors} == {torch.bfloat16}
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert twin.structure == weight.structure and torch.equal(twin.to_dense(), weight.to_dense())


def test_registered_layers() -> None:
    sparse = ["lowrank_sparse", "lowrank_sparse_packed"]
    assert format_names("linear") == ["cp", *sparse, "svd", "tr", "tr_matrix", "tt", "ttm", "tucker"]
    assert format_names("conv") == ["cp", *sparse, "tr", "tt", "ttm", "tucker", "tucker2"]
    assert format_names("embedding") == ["tr_matrix", "ttm"]
