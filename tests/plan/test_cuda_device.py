"""Plans, rates and tuning on a CUDA device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLayer, FactorizedLinear
from tensorcomp_ext.plan import get_plan, plans_for, rates, tune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = allowed
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    with tf32(False):
        yield


def convolution(dtype: torch.dtype = torch.float32) -> FactorizedConv2d:
    return FactorizedConv2d(24, 40, 3, padding=1, rank=(13, 11), device="cuda", dtype=dtype)


def matrix(dtype: torch.dtype = torch.float32) -> FactorizedLinear:
    return FactorizedLinear(48, 40, rank=13, device="cuda", dtype=dtype)


def image(layout: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(3, 24, 17, 15, device="cuda").contiguous(memory_format=layout)


def distance(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_plan_equals_the_dense_layer(layout: torch.memory_format, dtype: torch.dtype) -> None:
    for layer, x in ((convolution(dtype), image(layout)), (matrix(dtype), torch.randn(9, 48, device="cuda"))):
        x = x.to(dtype)
        with torch.no_grad():
            exact = copy.deepcopy(layer).double()
            expected = exact.to_dense()(x.double())
            for plan in plans_for(layer):
                if plan.support(layer, layer.case(x)).ok:
                    layer.plan = plan.name
                    for _ in range(2):
                        assert distance(layer(x), expected) <= TOLERANCES[dtype], plan.name


def test_training_gradients() -> None:
    for layer, x in ((convolution(), image()), (matrix(), torch.randn(9, 48, device="cuda"))):
        found = {}
        for plan in plans_for(layer):
            if not plan.support(layer, layer.case(x, training=True)).ok:
                continue
            layer.plan = plan.name
            for _ in range(2):
                layer.zero_grad()
                layer(x).square().sum().backward()
            found[plan.name] = [p.grad.double() for p in layer.parameters() if p.grad is not None]
        for name, gradients in found.items():
            for gradient, expected in zip(gradients, found["dense"], strict=True):
                assert distance(gradient, expected) <= 1e-4, name


def test_tf32_is_followed_from_call_to_call() -> None:
    layer, x = convolution(), image()
    with torch.no_grad():
        expected = copy.deepcopy(layer).double().to_dense()(x.double())
        for plan in plans_for(layer):
            if not plan.support(layer, layer.case(x)).ok:
                continue
            layer.plan = plan.name
            for allowed in (True, False):
                with tf32(allowed):
                    assert distance(layer(x), expected) <= (5e-3 if allowed else 1e-5), plan.name


@pytest.mark.parametrize("ready", [False, True])
def test_captured_calls(ready: bool) -> None:
    """A first call inside a capture leaves nothing behind for eager calls; later ones use what is ready."""
    for layer, x in ((convolution(), image()), (matrix(), torch.randn(9, 48, device="cuda"))):
        exact = copy.deepcopy(layer).double().to_dense()(x.double()).detach()
        for plan in plans_for(layer):
            if not plan.support(layer, layer.case(x, training=False)).ok:
                continue
            layer.plan = plan.name
            with torch.no_grad():
                # Libraries set themselves up outside of the capture.
                (layer if ready else copy.deepcopy(layer))(x)
                kept = dict(layer._prepared.weights) if layer._prepared is not None else {}
                assert bool(kept) == ready, plan.name
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = layer(x)
                assert layer._prepared is not None and layer._prepared.weights.keys() == kept.keys()
                assert distance(layer(x), exact) <= TOLERANCES[x.dtype], plan.name  # before any replay
                graph.replay()
                assert distance(y, exact) <= TOLERANCES[x.dtype], plan.name
                if ready:
                    continue
                for factor in layer.weight.parameters():
                    factor.mul_(2)
                wanted = copy.deepcopy(layer).double().to_dense()(x.double())
                graph.replay()  # packs the factors as they are now
                assert distance(y, wanted) <= TOLERANCES[x.dtype], plan.name
                for factor in layer.weight.parameters():
                    factor.div_(2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_tuning(cuda_graphs: bool, training: bool) -> None:
    cases: list[tuple[FactorizedLayer, Tensor]] = [
        (convolution(torch.float16), image().half()),
        (matrix(), torch.randn(9, 48, device="cuda")),
    ]
    for layer, x in cases:
        result = tune(layer, x, training=training, min_seconds=0.01, cuda_graphs=cuda_graphs)
        (entry,) = result.layers
        assert {"dense", "staged"} <= set(entry.timings)
        assert all(0 < t.p10 <= t.median <= t.p90 for t in entry.timings.values())
        with torch.set_grad_enabled(training):
            layer(x)
        assert next(c for c in layer.plans(x, training=training) if c.chosen).name == entry.choice


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_rates(dtype: torch.dtype) -> None:
    found = rates.measure(dtype, "cuda")
    kinds = {"conv", "pointwise", "linear"}
    if get_plan("fused").support(convolution(dtype), convolution(dtype).case(image().to(dtype))).ok:
        kinds |= {"fused", "partial", "pair"}
    assert set(found.macs) == kinds and rates.Rates.from_dict(found.to_dict()) is not None
