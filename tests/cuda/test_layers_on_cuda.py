"""Layers on CUDA: every plan, tuning, copies and moves, weights packed again when they change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cuda_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, MODES, set_precision
from torch import Tensor, nn
from tucker2_problems import relative

import tensorcomp_ext as tc
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.plan import PlannedLayer, plans_for
from tensorcomp_ext.plan.select import choose

modes = pytest.mark.parametrize("mode", MODES)

LAYERS: dict[str, tuple[Callable[[], PlannedLayer], tuple[int, ...]]] = {
    "conv": (lambda: FactorizedConv2d(18, 24, 3, padding=1, rank=(17, 6)), (3, 18, 9, 7)),
    "conv stride": (
        lambda: FactorizedConv2d(16, 31, (3, 5), (2, 1), (1, 2), bias=False, rank=(16, 31 // 2)),
        (2, 16, 12, 11),
    ),
    "conv of a stage": (lambda: FactorizedConv2d(64, 64, 3, padding=1, rank=(32, 32)), (8, 64, 28, 28)),
    "linear": (lambda: FactorizedLinear(48, 33, rank=7), (5, 3, 48)),
    "linear wide": (lambda: FactorizedLinear(256, 512, rank=64, bias=False), (130, 256)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
# Left to choose, a layer that was never tuned runs no kernels of ours on CUDA: they are named.
untuned_and_fused = pytest.mark.parametrize("plan", [None, "fused"])

OWN_KERNELS = ("fused", "partial")
LIBRARY_SLACK = 3.0
"""The library may pick Winograd's algorithm, which loses digits that ours keep."""


def build(name: str, mode: str, device: str) -> tuple[PlannedLayer, Tensor]:
    make, shape = LAYERS[name]
    layer = make()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.to(device, MODES[mode]), torch.randn(shape).to(device, MODES[mode])


def expected(layer: PlannedLayer, x: Tensor) -> Tensor:
    """The dense layer in float64, from the factors as they are."""
    double = copy.deepcopy(layer).double()
    with torch.no_grad():
        return double.to_dense()(x.double())  # type: ignore[operator]


def able(layer: PlannedLayer, x: Tensor) -> list[str]:
    return [p.name for p in plans_for(layer) if p.support(layer, layer.case(x)).ok]


def forward_tolerance(layer: PlannedLayer, mode: str) -> float:
    return FORWARD_TOLERANCE[mode] * (1.0 if layer.plan in OWN_KERNELS else LIBRARY_SLACK)


def gradient_tolerance(layer: PlannedLayer, mode: str) -> float:
    return GRADIENT_TOLERANCE[mode] * (1.0 if layer.plan in OWN_KERNELS else LIBRARY_SLACK)


def hold(layer: PlannedLayer, x: Tensor, plan: str | None) -> None:
    """Force a plan, which must serve."""
    assert plan is None or plan in able(layer, x), f"plan {plan!r} serves these sizes"
    layer.plan = plan


def check_inference(layer: PlannedLayer, x: Tensor, mode: str) -> None:
    wanted = expected(layer, x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for _ in range(2):  # bound at the first call, called as bound at the second
                assert relative(layer(x), wanted) <= forward_tolerance(layer, mode)


def check_training(layer: PlannedLayer, x: Tensor, mode: str) -> None:
    double = copy.deepcopy(layer).double()
    double.plan = "staged"
    leaf, leaf_double = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    wanted = double(leaf_double)
    grad = torch.randn(wanted.shape).to(x)
    theirs = torch.autograd.grad(wanted, [leaf_double, *double.parameters()], grad.double())
    for _ in range(2):
        y = layer(leaf)
        assert relative(y.detach(), wanted.detach()) <= forward_tolerance(layer, mode)
        ours = torch.autograd.grad(y, [leaf, *layer.parameters()], grad)
        for found, oracle in zip(ours, theirs, strict=True):
            assert relative(found, oracle) <= gradient_tolerance(layer, mode)


@every_layer
@modes
@pytest.mark.parametrize("plan", ["dense", "staged", "fused", "partial", None])
def test_every_plan(cuda: str, name: str, mode: str, plan: str | None) -> None:
    set_precision(mode)
    layer, x = build(name, mode, cuda)
    if plan is not None and plan not in [p.name for p in plans_for(layer)]:
        pytest.skip(f"plan {plan!r} is not for this kind of layer")
    layer.plan = plan
    if plan is not None and plan not in able(layer, x):
        assert plan == "partial", "the fused and the library plans serve these sizes"
        with pytest.raises(ValueError, match="cannot serve"), torch.no_grad():
            layer(x)
        return
    check_inference(layer, x, mode)
    if x.dim() == 4:
        check_inference(layer, x.contiguous(memory_format=torch.channels_last), mode)
    if plan == "partial" and not layer_trains(layer, x):
        return
    check_training(layer, x, mode)


def layer_trains(layer: PlannedLayer, x: Tensor) -> bool:
    """Whether the plan serves training too; the partial one need not."""
    support = [
        p.support(layer, layer.case(x, training=True)) for p in plans_for(layer) if p.name == layer.plan
    ]
    return all(s.ok for s in support)


@every_layer
@pytest.mark.parametrize("training", [False, True])
def test_tuning_keeps_results_right(cuda: str, name: str, training: bool) -> None:
    layer, x = build(name, "float16", cuda)
    result = tc.tune(layer, x, training=training, min_seconds=0.01)
    (entry,) = result.layers
    assert entry.choice in able(layer, x) and {"dense", "staged"} <= set(entry.timings)
    (check_training if training else check_inference)(layer, x, "float16")
    dense = entry.timings["dense"].median
    assert entry.timings[entry.choice].median <= dense


@every_layer
@untuned_and_fused
def test_copies_and_moves(cuda: str, name: str, plan: str | None) -> None:
    layer, x = build(name, "float32", "cpu")
    with torch.no_grad():
        on_cpu = layer(x)
        moved = copy.deepcopy(layer).to(cuda)
        hold(moved, x.to(cuda), plan)
        assert relative(moved(x.to(cuda)).cpu(), on_cpu) <= 1e-5 + forward_tolerance(moved, "float32")
        twin = copy.deepcopy(moved)
        assert torch.equal(twin(x.to(cuda)), moved(x.to(cuda)))
        low = twin.half()
        assert relative(low(x.to(cuda).half()).cpu(), on_cpu) <= FORWARD_TOLERANCE["float16"] * 2
        back = moved.cpu()
        back.plan = None
        assert torch.equal(back(x), on_cpu)


@every_layer
@pytest.mark.parametrize("plan", ["fused", "dense", "staged"])
def test_weights_are_prepared_again_when_they_change(cuda: str, name: str, plan: str) -> None:
    layer, x = build(name, "float32", cuda)
    if plan not in able(layer, x):
        pytest.skip(f"plan {plan!r} does not serve here")
    layer.plan = plan
    with torch.no_grad():
        before = layer(x)
        for factor in layer.weight.parameters():
            factor.mul_(1.5)
        after = layer(x)
    assert not torch.equal(before, after)
    assert relative(after, expected(layer, x)) <= forward_tolerance(layer, "float32")


@every_layer
@untuned_and_fused
def test_optimizer_steps_are_seen(cuda: str, name: str, plan: str | None) -> None:
    layer, x = build(name, "float32", cuda)
    hold(layer, x, plan)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            assert relative(layer(x), expected(layer, x)) <= forward_tolerance(layer, "float32")


@every_layer
@pytest.mark.parametrize("mode", ["float16", "bfloat16"])
@untuned_and_fused
def test_autocast(cuda: str, name: str, plan: str | None, mode: str) -> None:
    layer, x = build(name, "float32", cuda)
    hold(layer, x, plan)
    wanted = expected(layer, x)
    with torch.autocast("cuda", dtype=MODES[mode]):
        trained = layer(x)
        with torch.no_grad():
            inferred = layer(x)
    for y in (trained, inferred):
        assert y.dtype == MODES[mode] and relative(y.detach(), wanted) <= 3 * FORWARD_TOLERANCE[mode]
    trained.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@every_layer
def test_own_kernels_are_chosen_by_measurement_only(cuda: str, name: str) -> None:
    layer, x = build(name, "float16", cuda)
    for training in (False, True):
        assert choose(layer, layer.case(x, training=training)).name not in OWN_KERNELS


def test_compressed_network_under_a_graph(cuda: str) -> None:
    """What users do: compress, tune, capture, replay."""
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 24),
    ).eval()
    x = torch.randn(4, 16, 20, 20)
    compressed = tc.compress(model, rank={"3": (9, 13), "0": (8, 6), "7": 5}).model.eval()
    wanted = copy.deepcopy(compressed).double()(x.double()).detach()
    compressed, x = compressed.to(cuda, torch.float16), x.to(cuda, torch.float16)
    tc.tune(compressed, x, min_seconds=0.005)
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                compressed(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = compressed(x)
        graph.replay()
        torch.cuda.synchronize()
    assert relative(y.cpu(), wanted) <= 1e-2
