"""torch.jit.trace records the ops of a layer, with its parameters as they are when the trace runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorcomp_ext.compress import compress, fold
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

MODES: dict[str, Any] = {"rank": 3, "in_modes": (4, 5), "out_modes": (3, 4)}
LINEAR: dict[str, dict[str, Any]] = {
    "svd": {"rank": 3},
    "lowrank_sparse": {"rank": 3, "low_rank": "svd"},
    **{name: MODES for name in ("cp", "tucker", "tt", "ttm", "tr")},
}
CONV: dict[str, dict[str, Any]] = {
    "tucker2": {"rank": (4, 4)},
    "lowrank_sparse": {"rank": 4, "low_rank": "cp"},
    **{name: {"rank": 4} for name in ("cp", "tt", "tr")},
}


def layers() -> dict[str, tuple[Any, tuple[int, ...]]]:
    linear = {
        f"linear {name}": (lambda n=name: FactorizedLinear(20, 12, format=n, **LINEAR[n]), (5, 20))
        for name in LINEAR
    }
    conv = {
        f"conv {name}": (
            lambda n=name: FactorizedConv2d(16, 16, 3, padding=1, format=n, **CONV[n]),
            (2, 16, 9, 7),
        )
        for name in CONV
    }
    return linear | conv


LAYERS = layers()


def check(module: nn.Module, x: Tensor, other: Tensor) -> None:
    traced: Any = torch.jit.trace(module, x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.25)
        torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(traced(other), module(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_trace_follows_parameters_and_batches(name: str, grad: bool, called: bool) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().eval(), torch.randn(shape)
    with torch.set_grad_enabled(grad):
        if called:  # what the layer has prepared for such inputs must not end up in the trace
            layer(x)
        check(layer, x, torch.randn(7, *shape[1:]))


def test_gradients_pass_through_a_trace() -> None:
    torch.manual_seed(0)
    layer = FactorizedConv2d(16, 16, 3, padding=1, format="tr", rank=4)
    x = torch.randn(2, 16, 9, 7)
    traced: Any = torch.jit.trace(layer, x)
    found, expected = (
        torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (traced, layer)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_embedding() -> None:
    torch.manual_seed(0)
    table = FactorizedEmbedding(24, 12, rank=3, in_modes=(3, 4), out_modes=(4, 6))
    check(table, torch.randint(24, (5, 3)), torch.randint(24, (7, 3)))


def test_a_folded_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
    ).eval()
    x = torch.randn(2, 8, 9, 9)
    small = fold(compress(model, rank=(4, 4), example_inputs=x).model, example_inputs=x)
    small(x)
    check(small, x, torch.randn(3, 8, 9, 9))
