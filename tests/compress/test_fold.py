"""Folding: the same outputs from fewer modules, and what cannot be folded stays as it is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fold_networks import Block, conv, folded_layers, randomize
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext import _native
from tensorcomp_ext.compress.fold_weights import difference
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear, fold_layer
from tensorcomp_ext.plan import get_plan

ADDITIONS = ["plain", "in place", "method", "function", "broadcast"]
LEFT_ALONE = ["scaled", "into the other", "constant"]


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("add", ADDITIONS + LEFT_ALONE)
def test_a_residual_block_computes_the_same(add: str, shortcut: bool) -> None:
    model = randomize(Block(add, shortcut))
    x = torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        expected = model(x)
        made = tc.fold(model, x)
        assert difference(made(x), expected) < 1e-5
        assert difference(made(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    texts = {f.name: f.text for f in made.fold_report.folded}
    last = texts["shortcut.0" if shortcut and add != "broadcast" else "conv2"]
    assert ("residual" in last) == (add in ADDITIONS)


@pytest.mark.parametrize("plan", ["dense", "staged", "fused"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_every_plan_adds_and_rectifies(plan: str, relu: bool, second: bool) -> None:
    layer = conv(5, 7, stride=2)
    made = fold_layer(layer, relu=relu)
    made.plan = plan
    for shape in [(2, 5, 9, 8), (1, 5, 4, 4)]:
        x = torch.randn(shape)
        with torch.no_grad():
            y = layer(x)
            residual = torch.randn_like(y) if second else None
            kept = None if residual is None else residual.clone()
            expected = y if residual is None else y + residual
            found = made(x, residual)
            again = made(x, residual)
        assert difference(found, F.relu(expected) if relu else expected) < 1e-5
        assert torch.equal(found, again)
        assert residual is None or torch.equal(residual, kept)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["svd", "tt", "cp", "tr", "tr conv", "cp conv"])
def test_own_kernels_add_and_rectify_as_they_store(
    format: str, dtype: torch.dtype, relu: bool, second: bool
) -> None:
    """The call bound for a folded layer is one call of the kernel, of odd sizes, strided rows and none."""
    torch.manual_seed(0)
    layer: Any
    if format.endswith("conv"):
        layer = FactorizedConv2d(5, 7, 3, 2, 1, format=format.split()[0], rank=3, dtype=dtype)
        inputs = [torch.randn(2, 5, 9, 8), torch.randn(1, 5, 3, 3)]
    else:
        layer = FactorizedLinear(15, 21, format=format, rank=3, dtype=dtype)
        inputs = [torch.randn(9, 15), torch.randn(2, 3, 15), torch.randn(15, 4).t(), torch.randn(0, 15)]
    layer.bias.data.normal_()
    made = fold_layer(layer, relu=relu)
    made.plan = "fused"
    dense = layer.to_dense().double()
    for x in (given.to(dtype) for given in inputs):
        case = made.case(x, training=False)
        if not _native.status().ok:
            pytest.skip(_native.status().reason)
        assert get_plan("fused").support(made, case).ok
        with torch.no_grad():
            expected = dense(x.double())
            residual = torch.randn(expected.shape).to(dtype) if second else None
            whole = get_plan("fused").bind_folded(made, case, relu)
            assert whole is not None
            expected = expected if residual is None else expected + residual
            expected = F.relu(expected) if relu else expected
            for found in (whole(x, made.bias, residual), made(x, residual), made(x, residual)):
                assert found.shape == expected.shape and found.dtype == dtype
                if x.numel():
                    assert difference(found.double(), expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_gradients_and_single_images_go_through() -> None:
    made = fold_layer(conv(3, 3), relu=True)
    x, residual = torch.randn(3, 6, 6, requires_grad=True), torch.randn(3, 6, 6)
    made(x, residual).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with torch.no_grad():
        assert torch.equal(made(x, residual), made(x[None], residual[None])[0])


FORMATS = [("tucker2", (3, 2)), ("tucker", 2), ("cp", 5), ("tt", 3), ("tr", 2), ("ttm", 2)]


MODES: dict[str, Any] = {"in_modes": (2, 3), "out_modes": (4, 2)}


@pytest.mark.parametrize(
    ("format", "rank", "modes"), [(*f, {}) for f in FORMATS] + [(*f, MODES) for f in FORMATS[1:]]
)
def test_convolutions_of_every_format(format: str, rank: Any, modes: dict[str, Any]) -> None:
    layer = FactorizedConv2d(6, 8, 3, 2, 1, format=format, rank=rank, **modes)
    model = randomize(nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 6, 7, 8)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    texts = [f.text for f in made.fold_report.folded]
    # The cores of TTM hold modes of outputs and inputs alike: only what needs no factor per output is folded.
    assert len(texts) == (format != "ttm")
    assert all(text.startswith("batch normalization") and text.endswith("ReLU") for text in texts)
    assert any(" weights)" in text for text in texts) == (format in ("tucker", "tt") or bool(modes and texts))
    assert bool(made.fold_report.left) == (format == "ttm")


@pytest.mark.parametrize("format", ["svd", "cp", "tucker", "tt", "tr", "ttm", "tr_matrix"])
def test_linear_layers_of_every_format(format: str) -> None:
    model = randomize(
        nn.Sequential(FactorizedLinear(12, 8, format=format, rank=2), nn.BatchNorm1d(8), nn.ReLU())
    )
    x = torch.randn(9, 12)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    # Merged to a pair, this train takes no more than its cores; the others would.
    assert bool(made.fold_report.folded) == (format in ("svd", "tt"))
    if not made.fold_report.folded:
        text = made.fold_report.left[0].text
        assert ("no core of format" if format in ("ttm", "tr_matrix") else "merged") in text


def test_settings_of_another_format_are_dropped() -> None:
    # Whole modes: the train is a pair of matrices, which SVD stores in as many numbers.
    layer = FactorizedLinear(12, 8, format="tt", rank=2, in_modes=(12,), out_modes=(8,))
    x = torch.randn(9, 12)
    tc.tune(layer, x, min_seconds=0.001)
    layer.plan = "staged"
    (folded,) = folded_layers(tc.fold(randomize(nn.Sequential(layer, nn.BatchNorm1d(8), nn.ReLU())), x))
    assert folded.format == "svd" and folded.plan is None and folded.tuned == {}


def test_linear_layers_take_normalization_and_relu() -> None:
    model = randomize(
        nn.Sequential(
            FactorizedLinear(6, 8, rank=3), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5)
        )
    )
    x = torch.randn(9, 6)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    assert [f.text for f in made.fold_report.folded] == ["batch normalization, ReLU", "batch normalization"]
    left = [f.text for f in tc.fold(model).fold_report.left]
    assert len(left) == 2 and all("only example_inputs can tell" in text for text in left)


def test_a_normalization_along_the_sequence_is_no_factor_of_the_features() -> None:
    for layer in (FactorizedLinear(6, 8, rank=3), nn.Linear(6, 8)):
        model = randomize(nn.Sequential(layer, nn.BatchNorm1d(8)))
        x = torch.randn(4, 8, 6)
        made = tc.fold(model, x)
        with torch.no_grad():
            assert torch.equal(made(x), model(x))
        assert "[3] dims" in made.fold_report.left[0].text


def test_dense_layers_take_normalization() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    assert len(list(made.children())) == 2


def test_a_whole_network() -> None:
    model = randomize(tc.models.CifarResNet(8, option="B"))
    x = torch.randn(2, 3, 16, 16)
    compressed = tc.compress(model, rank=0.5, example_inputs=x).model
    before = copy.deepcopy(compressed.state_dict())
    made = tc.fold(compressed, x)
    assert made.fold_report.difference < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    assert all(torch.equal(before[k], v) for k, v in compressed.state_dict().items())
    assert "conv1: batch normalization, ReLU" in str(made.fold_report)
    result = tc.tune(made, x, min_seconds=0.001)
    assert len(result.layers) >= 7
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        with torch.no_grad():
            assert difference(twin(x), compressed.eval()(x)) < 1e-5


def test_compiled_and_exported() -> None:
    model = randomize(Block())
    x = torch.randn(2, 4, 6, 6)
    made = tc.fold(model, x)
    with torch.no_grad():
        expected = made(x)
        assert difference(torch.compile(made, fullgraph=True)(x), expected) < 1e-5
        assert difference(torch.export.export(made, (x,)).module()(x), expected) < 1e-5
