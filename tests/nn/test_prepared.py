"""Weights prepared for inference never outlive the factors they were made from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.ops import tucker2_conv2d
from tensorcomp_ext.plan import plans_for, state


def make() -> FactorizedConv2d:
    return FactorizedConv2d(6, 8, 3, padding=1, rank=(4, 3))


def names() -> list[str]:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    return [plan.name for plan in plans_for(layer) if plan.support(layer, layer.case(x)).ok]


every_plan = pytest.mark.parametrize("plan", names())


def expected(layer: FactorizedConv2d, x: Tensor) -> Tensor:
    weight = layer.weight.to_dense().detach()
    return nn.functional.conv2d(x.to(weight.dtype), weight, layer.bias.detach(), padding=1)


def step(layer: FactorizedConv2d) -> None:
    layer(torch.randn(1, 6, 5, 5, dtype=layer.weight.core.dtype)).square().sum().backward()
    torch.optim.Adam(layer.parameters(), 0.1).step()


def fused_step(layer: FactorizedConv2d) -> None:
    layer(torch.randn(1, 6, 5, 5)).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), 0.1, fused=True).step()


def in_place(layer: FactorizedConv2d) -> None:
    with torch.no_grad():
        layer.weight.factor_in[0, 0] += 1


def in_inference_mode(layer: FactorizedConv2d) -> None:
    with torch.inference_mode():
        layer.weight.core.mul_(3)


def load(layer: FactorizedConv2d) -> None:
    layer.load_state_dict(make().state_dict())


def assign(layer: FactorizedConv2d) -> None:
    layer.load_state_dict(make().state_dict(), assign=True)


def replace_parameter(layer: FactorizedConv2d) -> None:
    layer.weight.factor_out = nn.Parameter(torch.randn(8, 4))


def replace_weight(layer: FactorizedConv2d) -> None:
    layer.weight = make().weight


def replace_data(layer: FactorizedConv2d) -> None:
    layer.weight.core.data = torch.randn_like(layer.weight.core)


def write_data_then_eval(layer: FactorizedConv2d) -> None:
    layer.weight.core.data.mul_(2)
    layer.eval()


def write_data_then_clear(layer: FactorizedConv2d) -> None:
    layer.weight.core.data.mul_(2)
    layer.clear_cache()


def change_bias(layer: FactorizedConv2d) -> None:
    layer.bias.data.add_(1)


CHANGES = [
    step,
    fused_step,
    in_place,
    in_inference_mode,
    load,
    assign,
    replace_parameter,
    replace_weight,
    replace_data,
    write_data_then_eval,
    write_data_then_clear,
    change_bias,
]


@every_plan
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_change_is_noticed(
    plan: str, change: Callable[[FactorizedConv2d], None], mode: Callable[[], object]
) -> None:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    layer.plan = plan
    with mode():  # type: ignore[attr-defined]
        layer(x)
        before = layer(x)
    change(layer)
    with mode():  # type: ignore[attr-defined]
        after = layer(x)
    torch.testing.assert_close(after, expected(layer, x))
    assert not torch.allclose(before, after)


@every_plan
def test_dtype_move(plan: str) -> None:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    layer.plan = plan
    with torch.no_grad():
        layer(x)
        layer.bfloat16()
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    reference = expected(layer.float(), x)
    assert (y.float() - reference).norm() <= 2e-2 * reference.norm()


@every_plan
def test_prepared_once(plan: str) -> None:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    layer.plan = plan
    with torch.no_grad():
        layer(x)
        state = layer._prepared
        layer(x)
        layer(torch.randn(1, 6, 9, 9))
    assert state is not None and layer._prepared is state
    assert len(state.weights) == 1 and len(state.bound) == 2


@every_plan
def test_made_under_inference_mode(plan: str) -> None:
    x = torch.randn(2, 6, 7, 5)
    with torch.inference_mode():
        layer = make()
        layer.plan = plan
        first = layer(x)
        layer.weight.core.mul_(2)
        second = layer(x)
        bias = layer.bias[:, None, None]
        torch.testing.assert_close(second - bias, 2 * (first - bias))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), second)


@every_plan
def test_prepared_under_inference_mode_serves_outside(plan: str) -> None:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    layer.plan = plan
    with torch.inference_mode():
        y = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
    layer.requires_grad_(False)
    torch.testing.assert_close(layer(x), y)
    inner = layer(x.clone().requires_grad_())
    inner.sum().backward()


@every_plan
def test_frozen_layer_with_gradients_on(plan: str) -> None:
    layer, x = make().requires_grad_(False), torch.randn(2, 6, 7, 5)
    layer.plan = plan
    y = layer(x)
    assert not y.requires_grad and layer._prepared is not None
    layer.weight.core.requires_grad_()
    assert layer(x).requires_grad


@every_plan
def test_functional_call(plan: str) -> None:
    layer, other, x = make(), make(), torch.randn(2, 6, 7, 5)
    layer.plan = plan
    with torch.no_grad():
        mine = layer(x)
        theirs = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
        torch.testing.assert_close(theirs, expected(other, x))
        torch.testing.assert_close(layer(x), mine)


@every_plan
def test_parametrized_factor(plan: str) -> None:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    layer.plan = plan
    with torch.no_grad():
        layer(x)
    parametrizations.weight_norm(layer.weight, "core")
    with torch.no_grad():
        layer.weight.parametrizations.core.original0.mul_(2)
        torch.testing.assert_close(layer(x), expected(layer, x))
    parametrize.remove_parametrizations(layer.weight, "core")
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(layer, x))


@every_plan
def test_nothing_made_in_a_capture_is_kept(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    layer.plan = plan
    core = layer.weight.core.data.clone()
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(state, "capturing", lambda device: device == x.device)
            # Weights made while a graph is captured have no values yet.
            layer.weight.core.data.fill_(torch.nan)
            assert layer(x).isnan().any()
            layer.weight.core.data.copy_(core)
            torch.testing.assert_close(layer(x), expected(layer, x))
            assert layer._prepared is not None
            assert not layer._prepared.weights and not layer._prepared.bound
        torch.testing.assert_close(layer(x), expected(layer, x))
        assert len(layer._prepared.weights) == len(layer._prepared.bound) == 1


@every_plan
def test_a_capture_uses_weights_that_are_ready(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, other = make(), torch.randn(2, 6, 7, 5), torch.randn(1, 6, 9, 9)
    layer.plan = plan
    asked: list[torch.device] = []
    with torch.no_grad():
        y = layer(x)
        prepared = layer._prepared
        assert prepared is not None
        ((key, weights),) = prepared.weights.items()
        monkeypatch.setattr(state, "capturing", lambda device: asked.append(device) or True)
        torch.testing.assert_close(layer(x), y)
        assert not asked  # a bound call pays nothing for this
        torch.testing.assert_close(layer(other), expected(layer, other))
        assert asked == [x.device] and layer._prepared is prepared
        assert prepared.prepare(*key, lambda: pytest.fail("made anew")) is weights
    assert list(prepared.weights) == [key] and len(prepared.bound) == 1


def test_memory_policy_keeps_no_dense_copy() -> None:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    layer.plan, layer.prefer = "dense", "memory"
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(layer, x))
    assert layer._prepared is not None and not layer._prepared.weights
    with pytest.raises(ValueError, match="'latency' or 'memory', got 'speed'"):
        layer.prefer = "speed"


def test_compiled_fused_optimizer_is_noticed() -> None:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, fused=True)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    torch.compile(optimizer.step, backend="eager")()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(layer, x))


def test_many_shapes_stay_bounded() -> None:
    layer = make()
    layer.plan = "staged"
    with torch.no_grad():
        for rows in range(3, 330):
            layer(torch.ones(1, 6, rows, 3))
    assert layer._prepared is not None and len(layer._prepared.bound) <= 256


def test_data_parallel_replica_has_its_own_state() -> None:
    layer, x = make(), torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        layer(x)
    assert layer._replicate_for_data_parallel()._prepared is None
    assert layer._prepared is not None


@every_plan
def test_chain_under_autocast(plan: str) -> None:
    """The second layer's input is in the autocast dtype already, its bias is not."""
    layers, x = [make(), FactorizedConv2d(8, 5, 3, padding=1, rank=(3, 4))], torch.randn(2, 6, 7, 5)
    chain = nn.Sequential(*layers)
    exact = nn.functional.conv2d(
        expected(layers[0], x), layers[1].weight.to_dense().detach(), layers[1].bias.detach(), padding=1
    )
    for layer in layers:
        layer.plan = plan
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = chain(x)
        state = layers[1]._prepared
        layers[1].bias = nn.Parameter(layers[1].bias + 1)
        z = chain(x)
    assert y.dtype == torch.bfloat16 and layers[1]._prepared is state
    assert (y.float() - exact).norm() <= 2e-2 * exact.norm()
    assert (z.float() - exact - 1).norm() <= 2e-2 * (exact + 1).norm()


@every_plan
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_function_transforms(plan: str, mode: Callable[[], object]) -> None:
    layer, x = make(), torch.randn(3, 2, 6, 7, 5)
    layer.plan = plan
    parameters = dict(layer.named_parameters())
    each = torch.stack([expected(layer, sample) for sample in x])
    wanted = torch.autograd.grad(layer(x[0]).square().sum(), layer.weight.core)[0]

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = functional_call(layer, parameters, (x,))
        return y.square().sum()

    with mode():  # type: ignore[attr-defined]
        layer(x[0])  # a bound call of these sizes exists
        torch.testing.assert_close(vmap(layer)(x), each)
        gradients = vmap(grad(loss), (None, 0))(parameters, x)["weight.core"]
        torch.testing.assert_close(gradients[0], wanted, rtol=1e-4, atol=1e-4)


@every_plan
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode(plan: str, mode: Callable[[], object], frozen: bool) -> None:
    layer, (x, direction) = make().requires_grad_(not frozen), torch.randn(2, 2, 6, 7, 5)
    layer.plan = plan
    wanted = expected(layer, direction) - layer.bias.detach()[:, None, None]
    with mode():  # type: ignore[attr-defined]
        layer(x)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
        torch.testing.assert_close(tangent, wanted)
        torch.testing.assert_close(jvp(layer, (x,), (direction,))[1], wanted)


@pytest.mark.native
def test_forced_native_code_refuses_transforms() -> None:
    layer, x = make(), torch.randn(2, 2, 6, 7, 5)
    factors = tuple(f.detach() for f in layer.weight.factors)
    with pytest.raises(ValueError, match="cannot serve: function transforms"):
        vmap(lambda x: tucker2_conv2d(x, *factors, backend="native"))(x)
    assert vmap(lambda x: tucker2_conv2d(x, *factors))(x).shape == (2, 2, 8, 5, 3)


def test_weights_that_take_each_others_memory_are_noticed() -> None:
    layer = FactorizedLinear(6, 6, bias=False, format="tt", rank=2, in_modes=(6,), out_modes=(6,)).eval()
    x = torch.randn(4, 6)
    with torch.no_grad():
        layer(x)
        first, second = layer.weight.factors
        first.data, second.data = second.data.reshape(first.shape), first.data.reshape(second.shape)
        torch.testing.assert_close(layer(x), x @ layer.weight.to_dense().T, rtol=1e-4, atol=1e-5)


def test_a_weight_put_into_the_modules_is_noticed() -> None:
    layer, other = (FactorizedLinear(6, 5, bias=False, format="svd", rank=2).eval() for _ in range(2))
    x = torch.randn(4, 6)
    with torch.no_grad():
        layer(x)
        layer._modules["weight"] = other.weight
        torch.testing.assert_close(layer(x), other(x))
