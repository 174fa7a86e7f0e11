"""Gates of the hard concrete distribution, whose temperature falls in training."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .gates import Gate

_LOW, _HIGH = -0.1, 1.1


class ConcreteGate(Gate):
    """``z = clamp(1.2 s - 0.1, 0, 1)`` with ``s = sigmoid((a + ln(u / (1 - u))) / T)``, u uniform in (0, 1).

    ``phi = sigmoid(a)`` is the probability of an open gate that z approaches as T falls to 0. In evaluation
    gates are 1 where ``a > 0``, else 0.

    Args:
        mean, spread: mean and standard deviation of the first logits ``a``.
        temperature: T, which may be set anew at any time.

    Raises:
        ValueError: a temperature that is not above 0, a mean that is not finite.

    Source: Maddison et al. 2017; Louizos et al. 2018; Kodryan et al. 2023 (MARS).
    """

    fixed: ClassVar[bool] = False

    def __init__(self, mean: float = -1.5, spread: float = 0.01, temperature: float = 0.1) -> None:
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"ConcreteGate: temperature must be above 0 and finite, got {temperature}")
        if not math.isfinite(mean):
            raise ValueError(f"ConcreteGate: mean must be finite, got {mean}")
        self.mean, self.spread, self.temperature = mean, spread, temperature

    def sample(self, location: Tensor) -> Tensor:
        least = torch.finfo(location.dtype).eps
        uniform = torch.rand_like(location).clamp(least, 1.0 - least)
        soft = torch.sigmoid((location + uniform.logit()) / self.temperature)
        return (_LOW + (_HIGH - _LOW) * soft).clamp(0.0, 1.0)

    def decided(self, location: Tensor) -> Tensor:
        return (location.detach() > 0.0).to(location.dtype)

    @property
    def open_at(self) -> float:
        return 1.0

    def probability(self, location: Tensor) -> Tensor:
        return torch.sigmoid(location - self.temperature * math.log(-_LOW / _HIGH))

    def log_prior(self, location: Tensor, prior: float) -> Tensor:
        """``phi ln(prior) + (1 - phi) ln(1 - prior)`` of each gate."""
        phi = torch.sigmoid(location)
        return phi * math.log(prior) + (1.0 - phi) * math.log1p(-prior)

    def settings(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread}
