"""Standard layers made of factorized ones: kinds, groups, geometry, and exactness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": (3, 5), "padding": "same"},
    {"kernel_size": 1},
]
FORMATS: list[tuple[str, Any, list[int]]] = [
    ("tucker2", 4, [1, 1, 1]),
    ("tucker", (4, 3, 1, 1), [1, 1, 1]),
    ("tt", (3, 4), [1, 1, 1]),
    ("tr", (3, 2, 4), [1, 3, 1]),
    ("cp", 5, [1, 5, 5, 1]),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("format,rank,groups", FORMATS, ids=lambda value: str(value))
def test_convolutions(geometry: dict[str, Any], format: str, rank: Any, groups: list[int]) -> None:
    torch.manual_seed(0)
    layer = FactorizedConv2d(7, 9, **geometry, format=format, rank=rank, dtype=torch.float64)
    x = torch.randn(2, 7, 9, 11, dtype=torch.float64)
    sequence = layer.to_sequential()
    assert [type(part) for part in sequence] == [nn.Conv2d] * len(groups)
    assert [part.groups for part in sequence] == groups
    assert [part.bias is not None for part in sequence] == [False] * (len(groups) - 1) + [True]
    torch.testing.assert_close(sequence(x), layer.to_dense()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank,layers", [((1, 2), 2), ((9, 9), 1)])
def test_taps_are_separate_where_that_is_less_work(rank: tuple[int, int], layers: int) -> None:
    modes = {"out_modes": (3, 4), "in_modes": (2, 5)}
    layer = FactorizedConv2d(10, 12, 3, format="ttm", rank=rank, dtype=torch.float64, **modes)
    x = torch.randn(2, 10, 6, 7, dtype=torch.float64)
    sequence = layer.to_sequential()
    assert len(sequence) == layers
    torch.testing.assert_close(sequence(x), layer.to_dense()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "format,rank,inner",
    [
        ("tt", (4, 5, 4), 5),
        ("tr", (2, 3, 2, 3), 4),
        ("cp", 6, 6),
        ("tucker", (2, 3, 4, 2), 6),
        ("tucker", (3, 4, 2, 2), 4),
        ("tt", (4, 20, 4), None),
        ("ttm", 2, None),
        ("tr_matrix", 2, None),
    ],
)
def test_linear_layers(format: str, rank: Any, inner: int | None) -> None:
    modes = {"out_modes": (4, 5), "in_modes": (5, 4), "input_order": (1, 0)}
    layer = FactorizedLinear(20, 20, format=format, rank=rank, dtype=torch.float64, **modes)
    x = torch.randn(3, 20, dtype=torch.float64)
    sequence = layer.to_sequential()
    widths = [part.out_features for part in sequence]  # the inner width is the smaller product of ranks
    assert widths == ([20] if inner is None else [inner, 20])
    torch.testing.assert_close(sequence(x), layer.to_dense()(x), rtol=0, atol=1e-12)
