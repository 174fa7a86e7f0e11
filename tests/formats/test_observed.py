"""Fits of the observed entries alone, by format: what spoils the others must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorcomp_ext.formats import get_format

MATRIX = {"out_modes": (3, 5), "in_modes": (4, 4), "input_order": (1, 0)}
CASES: list[tuple[str, tuple[int, ...], Any, dict[str, Any]]] = [
    ("svd", (18, 14), 2, {}),
    ("tucker2", (9, 8, 3, 3), (2, 2), {}),
    ("tt", (15, 16), 2, MATRIX),
    ("tt", (9, 8, 3, 3), (2, 2), {}),
    ("ttm", (15, 16), 2, MATRIX),
    ("ttm", (11, 20), 1, {"out_modes": (3, 4), "in_modes": (4, 5)}),  # one row of padding
    ("ttm", (6, 8, 3, 3), (2, 2), {"out_modes": (2, 3), "in_modes": (4, 2)}),
    ("cp", (15, 16), 2, MATRIX),
    ("cp", (9, 8, 3, 3), 2, {}),
    ("tucker", (15, 16), (2, 2, 2, 2), MATRIX),
    ("tucker", (9, 8, 3, 3), (2, 2, 2, 2), {}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'x'.join(map(str, case[1]))}")
def test_planted_weight_is_recovered_under_spikes(case: Any) -> None:
    name, shape, rank, options = case
    torch.manual_seed(1)
    cls = get_format(name)
    planted = cls.random(shape, rank, dtype=torch.float64, **options).to_dense().detach()
    spikes = torch.rand(shape) < 0.05
    spoiled = torch.where(spikes, planted + 10 * planted.abs().max(), planted)
    found = cls.from_observed(spoiled, ~spikes, rank, iterations=400, **options)
    assert (found.to_dense() - planted).norm() < 1e-6 * planted.norm()
    assert (cls.from_dense(spoiled, rank, **options).to_dense() - planted).norm() > 0.1 * planted.norm()


@pytest.mark.parametrize("name,shape", [("tr", (6, 6)), ("tr", (4, 4, 3, 3)), ("tr_matrix", (6, 6))])
def test_rings_have_no_such_fit(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name}: there is no fit of the observed entries"):
        get_format(name).from_observed(torch.randn(shape), torch.ones(shape, dtype=torch.bool), 2)


@pytest.mark.parametrize("name", ["svd", "tt", "ttm"])
def test_bad_masks_are_named(name: str) -> None:
    cls, weight = get_format(name), torch.randn(6, 8)
    with pytest.raises(ValueError, match=r"must be \[6, 8\], got \[8, 6\]"):
        cls.from_observed(weight, torch.ones(8, 6, dtype=torch.bool), 2)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch\.float32"):
        cls.from_observed(weight, torch.ones(6, 8), 2)
    with pytest.raises(ValueError, match="leaves no entry to fit"):
        cls.from_observed(weight, torch.zeros(6, 8, dtype=torch.bool), 2)
