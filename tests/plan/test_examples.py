"""What a model says of example inputs that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tensorcomp_ext.nn import FactorizedLinear
from tensorcomp_ext.plan import tune
from tensorcomp_ext.plan.examples import call_model


def network() -> nn.Module:
    last = FactorizedLinear(6, 2, format="svd", rank=1)
    return nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.ReLU(), last))


@pytest.mark.parametrize("call", [call_model, tune])
def test_the_innermost_layer_is_named(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"layer '1\.1': FactorizedLinear: x must be \[\.\.\., 6\]"):
        call(network(), torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"example_inputs do not pass layer '0': mat1 and mat2"):
        call(network(), torch.zeros(3, 7))


def test_other_errors_stay_as_they_are() -> None:
    class Own(ValueError):
        def __init__(self, code: int) -> None:
            self.code = code

    class Raises(nn.Module):
        def __init__(self, error: Exception) -> None:
            super().__init__()
            self.error = error

        def forward(self, x: Tensor) -> Tensor:
            raise self.error

    for error in (Own(3), KeyError("k"), ValueError("of the model itself")):
        with pytest.raises(type(error)) as caught:
            call_model(Raises(error), torch.zeros(1))
        assert caught.value is error
    with pytest.raises(Own) as caught:
        call_model(nn.Sequential(Raises(Own(3))), torch.zeros(1))
    assert caught.value.code == 3  # type: ignore[attr-defined]
