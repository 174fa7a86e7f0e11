"""Weights with a sparse part, in every format of the low-rank one, and their dense form by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tensorcomp_ext.formats import LowRankSparse

MODES = ("additive", "masking")
MATRIX = {"out_modes": (3, 5), "in_modes": (2, 7)}
CASES: list[tuple[str, tuple[int, ...], Any, dict[str, Any]]] = [
    ("svd", (15, 14), 3, {}),
    ("svd", (9, 5, 3, 3), 4, {}),
    ("cp", (15, 14), 1, MATRIX),
    ("cp", (9, 5, 3, 3), 6, {}),
    ("tucker", (15, 14), (2, 3, 2, 3), MATRIX),
    ("tucker", (8, 6, 3), (3, 2, 2, 2, 3), {"out_modes": (4, 2), "in_modes": (2, 3)}),
    ("tucker2", (9, 5, 2, 1, 3), (4, 1), {}),
    ("tucker2", (9, 5, 1, 1), (3, 2), {}),
    ("tt", (15, 14), (2, 4, 3), {**MATRIX, "input_order": (1, 0)}),
    ("tt", (9, 5, 3, 3), (4, 5), {}),
    ("ttm", (15, 14), 3, MATRIX),
    ("ttm", (9, 5, 3, 3), 2, {}),
    ("tr", (15, 14), (2, 3, 1, 2), MATRIX),
    ("tr", (9, 5, 3, 3), (2, 3, 2), {}),
    ("tr_matrix", (15, 14), 2, MATRIX),
    ("none", (15, 14), (), {}),
    ("none", (9, 1, 3, 3), (), {}),
]
every_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0]}-{'x'.join(map(str, case[1]))}"
)
every_mode = pytest.mark.parametrize("mode", MODES)


def made(case: Any, mode: str = "additive", share: float = 0.3, **options: Any) -> Any:
    """A random weight of which the mask keeps a share."""
    name, shape, rank, structure = case
    torch.manual_seed(0)
    options = {"dtype": torch.float64, **options}
    weight = LowRankSparse.random(shape, rank, low_rank=name, mode=mode, **structure, **options)
    weight.keep(torch.rand(shape) < share)
    return weight


def low_rank_of(weight: Any) -> Tensor:
    if weight.low_rank is None:
        return torch.zeros(weight.shape, dtype=torch.float64)
    dense: Tensor = weight.low_rank.to_dense().detach().reshape(weight.shape)
    return dense


def sparse_of(weight: Any) -> Tensor:
    found: Tensor = weight.sparse.detach().reshape(weight.shape)
    return found


def expected(weight: Any) -> Tensor:
    kept, low, sparse = weight.kept.double(), low_rank_of(weight), sparse_of(weight)
    return low + kept * sparse if weight.mode == "additive" else (1 - kept) * low + kept * sparse
