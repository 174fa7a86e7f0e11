"""Tuning of folded layers: measured as they are called, with what they add."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.nn.folded import FoldedLayer, fold_layer
from tensorcomp_ext.plan import tune, tuner


class Block(nn.Module):
    def __init__(self, layer: FoldedLayer, named: bool) -> None:
        super().__init__()
        self.layer, self.named = layer, named

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.layer(x, residual=residual) if self.named else self.layer(x, residual)
        return y


def timed_results(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the calls that are timed return."""
    results: list[Tensor] = []
    measured = tuner.time_interleaved

    def timed(calls: dict[str, Any], *how: Any) -> Any:
        results.extend(call() for call in calls.values())
        return measured(calls, *how)

    monkeypatch.setattr(tuner, "time_interleaved", timed)
    return results


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_the_residual_is_measured_too(monkeypatch: pytest.MonkeyPatch, named: bool, relu: bool) -> None:
    layer = fold_layer(FactorizedConv2d(6, 5, 3, padding=1, rank=(3, 2)), relu=relu)
    results, given = timed_results(monkeypatch), []
    executor = FoldedLayer.executor

    def watched(self: FoldedLayer, plan: Any, x: Tensor) -> Any:
        bound = executor(self, plan, x)

        def call(x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
            given.append(residual)
            return bound(x, bias, residual)

        return call

    monkeypatch.setattr(FoldedLayer, "executor", watched)
    residual = torch.randn(2, 5, 7, 6).contiguous(memory_format=torch.channels_last)
    result = tune(Block(layer, named), (torch.randn(2, 6, 7, 6), residual), min_seconds=1e-3)
    assert len(result.layers) == 1 and len(results) >= 3
    in_use = given[-1]
    assert all(r is not None and r.shape == residual.shape for r in given)
    assert in_use.stride() == residual.stride()
    assert all(bool((y >= 0).all()) == relu for y in results)


def test_an_unbatched_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fold_layer(FactorizedConv2d(6, 5, 3, padding=1, rank=(3, 2)), relu=True)
    results = timed_results(monkeypatch)
    tune(Block(layer, False), (torch.randn(6, 7, 6), torch.randn(5, 7, 6)), min_seconds=1e-3)
    assert {tuple(y.shape) for y in results} == {(1, 5, 7, 6)}


def test_rectified_layers_and_others_are_measured_apart() -> None:
    plain = FactorizedLinear(12, 9, rank=3)
    model = nn.Sequential(
        fold_layer(plain), nn.Linear(9, 12), fold_layer(plain, relu=True), nn.Linear(9, 12), fold_layer(plain)
    )
    seen: list[str] = []
    tune(model, torch.randn(4, 12), progress=lambda *event: seen.append(event[2]), min_seconds=1e-3)
    assert seen == ["0", "2", ""]


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fold_layer(FactorizedLinear(12, 9, rank=3), relu=True)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    results = timed_results(monkeypatch)
    tune(Block(layer, True), (torch.randn(4, 12), torch.randn(4, 9)), training=True, min_seconds=1e-3)
    # The gradient of the bias counts where what was added is positive.
    of_bias = [g for gradients in results for g in gradients if g.shape == (9,)]
    assert len(of_bias) == len(results) and all(0 < float(g.sum()) < 36 for g in of_bias)
