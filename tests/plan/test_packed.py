"""The dense weight laid out once: what the library computes, in the layout it answers in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorcomp_ext.nn import FactorizedConv1d, FactorizedConv2d, fold_layer
from tensorcomp_ext.plan import get_plan, packed, plans_for
from tensorcomp_ext.plan.packed import _available

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"
)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# c_in, c_out, kernel, stride, padding, dilation
WINDOWS: list[tuple[Any, ...]] = [
    (1, 1, 1, 1, 0, 1),
    (5, 7, 3, 1, 1, 1),
    (16, 33, 3, 2, 1, 1),
    (8, 8, (3, 5), 1, "same", 1),
    (6, 3, 3, (1, 2), (2, 0), 2),
    (17, 4, (2, 3), 1, "valid", 1),
]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_agrees_with_the_dense_layer(
    window: tuple[Any, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    c_in, c_out, *geometry = window
    layer = FactorizedConv2d(c_in, c_out, *geometry, rank=(1, 1) if c_in == 1 else (3, 2), dtype=dtype)
    layer.bias.data.normal_()
    dense = layer.to_dense().double()
    layer.plan = "packed"
    for n in (0, 1, 3):
        x = torch.randn(n, c_in, 9, 8, dtype=dtype).contiguous(memory_format=layout)
        with torch.no_grad():
            y, expected = layer(x), dense(x.double())
            like = torch.nn.functional.conv2d(x, layer.weight.to_dense(), None, *geometry[1:])
        assert y.shape == expected.shape and y.dtype == dtype
        if n:
            assert difference(y, expected) < (1e-5 if dtype == torch.float32 else 1e-2)
            assert y.is_contiguous(memory_format=layout) and like.is_contiguous(memory_format=layout)


@needs_onednn
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_adds_and_rectifies(relu: bool, second: bool, layout: torch.memory_format) -> None:
    layer = FactorizedConv2d(5, 7, 3, 2, 1, rank=(3, 2))
    made = fold_layer(layer, relu=relu)
    made.plan = "packed"
    x = torch.randn(2, 5, 9, 8).contiguous(memory_format=layout)
    with torch.no_grad():
        y = layer(x)
        residual = torch.randn(y.shape) if second else None
        kept = None if residual is None else residual.clone()
        found = made(x, residual)
    expected = y if residual is None else y + residual
    assert difference(found, expected.relu() if relu else expected) < 1e-5
    assert residual is None or torch.equal(residual, kept)
    assert found.is_contiguous(memory_format=layout)


@needs_onednn
def test_follows_a_change_of_the_factors() -> None:
    layer = FactorizedConv2d(4, 4, 3, rank=(2, 2))
    layer.plan = "packed"
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        before = layer(x)
        layer.weight.core.mul_(2.0)
        assert (
            difference(layer(x) - layer.bias[:, None, None], 2 * (before - layer.bias[:, None, None])) < 1e-5
        )


@needs_onednn
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"training": True}, "for inference only"),
        ({"prefer": "memory"}, "prefer='memory'"),
        ({"dtype": "float64"}, "takes float32 and bfloat16, not float64"),
        ({"device": "cuda"}, "for the CPU only"),
    ],
)
def test_refusals(change: dict[str, Any], reason: str) -> None:
    layer = FactorizedConv2d(4, 4, 3, rank=(2, 2))
    case = layer.case(torch.empty(1, 4, 6, 6), training=False)._replace(**change)
    support = get_plan("packed").support(layer, case)
    assert not support.ok and reason in support.reason


def test_uneven_padding_and_other_dimensions() -> None:
    layer = FactorizedConv2d(4, 4, 2, padding="same", rank=(2, 2))
    support = get_plan("packed").support(layer, layer.case(torch.empty(1, 4, 6, 6), training=False))
    assert not support.ok and "one side" in support.reason
    assert "packed" not in [p.name for p in plans_for(FactorizedConv1d(4, 4, 3, rank=(2, 2)))]


@pytest.fixture
def asked_anew() -> Iterator[None]:
    _available.cache_clear()
    yield
    _available.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_a_torch_without_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise AttributeError("no attribute '_convolution_pointwise'")

    monkeypatch.setattr(packed, "_ops", missing)
    assert "this torch has not the packed convolution" in _available(torch.float32).reason


@needs_onednn
@pytest.mark.usefixtures("asked_anew")
def test_the_question_leaves_the_callers_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.autocast("cpu"):
        assert _available(torch.float32).ok
    assert torch.equal(torch.rand(2), expected)
    _available.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert _available(torch.float32).ok
    finally:
        torch.set_default_dtype(torch.float32)
    _available.cache_clear()
    with torch.device("meta"):
        assert _available(torch.float32).ok


@needs_onednn
def test_the_kept_weight_is_rounded_once_under_autocast() -> None:
    layer = FactorizedConv2d(64, 64, 3, rank=(16, 16))
    x = torch.randn(1, 64, 6, 6)
    expected = layer.to_dense().double()(x.double())
    errors = {}
    for plan in ("dense", "packed"):
        layer.plan = plan
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            errors[plan] = difference(layer(x), expected)
    assert errors["packed"] <= 1.05 * errors["dense"]


@needs_onednn
def test_several_shapes_and_threads() -> None:
    layer = FactorizedConv2d(16, 16, 3, padding=1, rank=(4, 4))
    layer.plan = "packed"
    dense = layer.to_dense()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for n, size in ((1, 7), (3, 20), (1, 33)):
                x = torch.randn(n, 16, size, size)
                with torch.no_grad():
                    assert difference(layer(x), dense(x)) < 1e-5
    finally:
        torch.set_num_threads(threads)
