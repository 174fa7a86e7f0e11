"""Training calls are bound once for each kind of input, and nothing that changes afterwards is missed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.plan import get_plan, plans_for


def make(**options: object) -> FactorizedConv2d:
    return FactorizedConv2d(6, 8, 3, rank=(4, 3), **{"padding": 1, **options})


def names() -> list[str]:
    layer = make()
    return [p.name for p in plans_for(layer) if p.support(layer, layer.case(torch.ones(1, 6, 7, 5))).ok]


every_plan = pytest.mark.parametrize("plan", names())


def bound(plan: str, **options: object) -> tuple[FactorizedConv2d, Tensor]:
    """A layer that has seen two training calls with the input."""
    layer, x = make(**options), torch.randn(2, 6, 7, 5, requires_grad=True)
    layer.plan = plan
    nn.init.normal_(layer.bias)
    layer(x)
    layer(x)
    assert len(layer._trained) == 1
    return layer, x


def check(layer: FactorizedConv2d, x: Tensor, tolerance: float = 1e-5) -> None:
    """Output and gradients of a call against the dense convolution in float64."""
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    exact = copy.deepcopy(layer).double()
    doubles = [
        x.detach().double().requires_grad_(x.requires_grad),
        *(p for p in exact.parameters() if p.requires_grad),
    ]
    y, wanted = layer(x), exact.geometry.apply(doubles[0], exact.weight.to_dense(), exact.bias)
    assert (y - wanted).norm() <= tolerance * wanted.norm()
    gradient = torch.randn_like(wanted)
    if not x.requires_grad:
        leaves, doubles = leaves[1:], doubles[1:]
    found = torch.autograd.grad(y, leaves, gradient.to(y.dtype))
    for ours, theirs in zip(found, torch.autograd.grad(wanted, doubles, gradient), strict=True):
        assert (ours - theirs).norm() <= 10 * tolerance * theirs.norm()


def refuse(*_: object) -> None:
    raise AssertionError("the call was checked again")


@every_plan
@pytest.mark.parametrize("bias", [True, False])
def test_checked_once(plan: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(bias=bias), torch.randn(2, 6, 7, 5)
    layer.plan = plan
    layer(x)
    monkeypatch.setattr(FactorizedConv2d, "check_input", refuse)
    for _ in range(2):
        check(layer, x)
        torch.optim.SGD(layer.parameters(), 0.1).step()
        check(layer, x.clone().requires_grad_())
    with pytest.raises(AssertionError, match="checked again"):
        layer(torch.randn(1, 6, 7, 5))


def test_linear_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = FactorizedLinear(6, 5, rank=2), torch.randn(3, 6)
    y = layer(x)
    monkeypatch.setattr(FactorizedLinear, "check_input", refuse)
    assert torch.equal(layer(x), y) and layer(x).requires_grad


@every_plan
def test_values_are_read_at_each_call(plan: str) -> None:
    layer, x = bound(plan)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=True)
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
        check(layer, x)
    layer.weight.core.data.mul_(2)
    check(layer, x)
    layer.load_state_dict(make().state_dict(), assign=True)
    check(layer, x)
    layer.weight = make().weight
    check(layer, x)


@every_plan
def test_freezing(plan: str) -> None:
    layer, x = bound(plan)
    still = x.detach()
    layer(still)
    layer.requires_grad_(False)
    y = layer(still)
    assert not y.requires_grad and layer._prepared is not None
    assert layer(x).requires_grad
    check(layer, x)
    layer.bias.requires_grad_()
    check(layer, still)
    layer.bias.requires_grad_(False)
    assert torch.equal(layer(still), y) and not layer(still).requires_grad


@every_plan
def test_autocast_on_and_off(plan: str) -> None:
    layer, x = bound(plan)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            check(layer, x, 2e-2)
            low = x.detach().bfloat16().requires_grad_()
            layer(low).float().sum().backward()
            assert low.grad is not None and low.grad.dtype == torch.bfloat16
        assert layer(x).dtype == torch.float32
        check(layer, x)
    assert len(layer._trained) == 3


@every_plan
def test_parametrized_factors(plan: str) -> None:
    layer, x = bound(plan)
    parametrizations.weight_norm(layer.weight, "core")
    for _ in range(2):
        check(layer, x)
        with torch.no_grad():
            layer.weight.parametrizations.core.original0.mul_(2)
    parametrize.remove_parametrizations(layer.weight, "core")
    check(layer, x)
    check(layer, x)


@every_plan
def test_parametrized_bias(plan: str) -> None:
    layer, x = bound(plan)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            layer(x)
    with torch.no_grad():
        layer(x.detach())
    parametrize.register_parametrization(layer, "bias", nn.Softplus())
    for _ in range(2):
        wanted = layer.geometry.apply(x, layer.weight.to_dense(), layer.bias)
        torch.testing.assert_close(layer(x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(layer(x.detach()), wanted)
    layer(x).sum().backward()
    assert layer.parametrizations.bias.original.grad is not None


@every_plan
def test_pruned_factor(plan: str) -> None:
    layer, x = bound(plan)
    prune.l1_unstructured(layer.weight, "core", amount=0.5)
    y = layer(x)
    torch.testing.assert_close(y, layer.geometry.apply(x, layer.weight.to_dense(), layer.bias))
    y.sum().backward()
    gradient = layer.weight.core_orig.grad
    assert isinstance(gradient, Tensor) and not gradient[layer.weight.core_mask == 0].any()


REPLACEMENTS: dict[str, Callable[[FactorizedConv2d], object]] = {
    "rank": lambda layer: setattr(layer.weight, "factor_out", nn.Parameter(torch.randn(8, 5))),
    "channels": lambda layer: setattr(layer.weight, "factor_in", nn.Parameter(torch.randn(5, 3))),
    "dtype": lambda layer: setattr(layer.weight, "factor_in", nn.Parameter(torch.randn(6, 3).double())),
    "core's dtype": lambda layer: layer.weight.core.__setattr__("data", layer.weight.core.data.bfloat16()),
    "core's rank": lambda layer: layer.weight.core.__setattr__("data", torch.randn(4, 2, 3, 3)),
    "kernel": lambda layer: setattr(layer.weight, "core", nn.Parameter(torch.randn(4, 3, 11, 3))),
    "bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(9))),
    "device": lambda layer: setattr(
        layer.weight, "core", nn.Parameter(torch.ones(4, 3, 3, 3, device="meta"))
    ),
}


@every_plan
@pytest.mark.parametrize("what", REPLACEMENTS)
def test_unfit_replacements_are_refused_in_the_same_words(plan: str, what: str) -> None:
    layer, x = bound(plan)
    fresh = copy.deepcopy(layer)
    said = []
    for one in (fresh, layer):
        REPLACEMENTS[what](one)
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            one(x)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


@every_plan
def test_fitting_replacements_are_taken(plan: str) -> None:
    layer, x = bound(plan, padding="same")
    weight = layer.weight
    weight.core, weight.factor_in = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.randn(6, 2))
    check(layer, x)
    weight.core = nn.Parameter(torch.randn(4, 2, 5, 1))  # another window under padding="same"
    check(layer, x)
    check(layer, x)
    layer.bias = None
    check(layer, x)
    check(layer, x)


@every_plan
def test_unbatched(plan: str) -> None:
    layer, x = bound(plan)
    for _ in range(2):
        torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert len(layer._trained) == 2


@pytest.mark.skipif(len(names()) < 3, reason="needs the native plan")
def test_threads_and_plans_set_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = bound("fused")
    monkeypatch.setattr(FactorizedConv2d, "check_input", refuse)
    layer(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        with pytest.raises(AssertionError, match="checked again"):
            layer(x)
    finally:
        torch.set_num_threads(before)
    monkeypatch.undo()
    calls: list[str] = []
    staged = get_plan("staged").of(layer)
    run = staged.run
    monkeypatch.setattr(staged, "run", lambda *a: calls.append("staged") or run(*a))
    layer.plan = "staged"
    layer(x)
    layer(x)
    assert calls == ["staged", "staged"]
    for forget in (layer.clear_cache, layer.train, layer.eval, layer.double):
        layer.float()(x)
        assert layer._trained
        forget()
        assert not layer._trained


@every_plan
def test_copies(plan: str) -> None:
    layer, x = bound(plan)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert not twin._trained and layer._trained
        check(twin, x)
        check(twin, x)
    twin = copy.deepcopy(layer)
    twin(x)
    twin(x).sum().backward()
    assert twin.weight.core.grad is not None and layer.weight.core.grad is None


@every_plan
def test_functional_call(plan: str) -> None:
    layer, x = bound(plan)
    other = {name: p.detach().clone().requires_grad_() for name, p in make().named_parameters()}
    y = functional_call(layer, other, (x,))
    y.sum().backward()
    assert all(p.grad is not None for p in other.values())
    assert all(p.grad is None for p in layer.parameters())
    check(layer, x)


@every_plan
def test_second_derivatives(plan: str) -> None:
    layer, x = bound(plan)
    given = [x, layer.weight.core]
    first = torch.autograd.grad(layer(x).square().sum(), given, create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in first), given)
    y = layer.geometry.apply(x, layer.weight.to_dense(), layer.bias)
    wanted = torch.autograd.grad(y.square().sum(), given, create_graph=True)
    for ours, theirs in zip(
        found, torch.autograd.grad(sum(g.square().sum() for g in wanted), given), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_many_shapes_stay_bounded() -> None:
    layer = make()
    layer.plan = "staged"
    for rows in range(3, 300):
        layer(torch.ones(1, 6, rows, 3))
    assert 0 < len(layer._trained) <= 256


def test_other_kinds_of_input() -> None:
    layer, x = bound("staged")
    assert layer(x.detach().to("meta")).device.type == "meta"
    for wrong, kind in ((x[:, 1:], ValueError), (x.double(), TypeError)):
        with pytest.raises(kind):
            layer(wrong)
    check(layer, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_())
    check(layer, nn.Parameter(x.detach()))
    (layer(x) + layer(x)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
