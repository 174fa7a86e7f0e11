"""Gates with clipped Gaussian noise, trained by the gradient through the noise."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .gates import Gate


class GaussianGate(Gate):
    """``z = clamp(m + sigma eps, 0, 1)`` with ``m = mu + offset`` and ``eps ~ N(0, 1)``.

    ``P(z > 0) = Phi(m / sigma)``, whose sum is the expected number of open gates. In evaluation
    ``z = clamp(m, 0, 1)``. The clamp has no gradient outside (0, 1): gates that noise hardly ever brings back
    there are moved by a penalty alone.

    Args:
        sigma: standard deviation of the noise.
        offset: what is added to the trained ``mu``.
        spread: standard deviation of the first ``mu``.

    Raises:
        ValueError: a sigma that is not above 0, a spread below 0.

    Source: Yamada et al. 2020 (stochastic gates), with offset 0.5 there.
    """

    fixed: ClassVar[bool] = True

    def __init__(self, sigma: float = 0.5, offset: float = 1.2, spread: float = 0.01) -> None:
        if not 0.0 < sigma < math.inf:
            raise ValueError(f"GaussianGate: sigma must be above 0 and finite, got {sigma}")
        if not 0.0 <= spread < math.inf:
            raise ValueError(f"GaussianGate: spread must be 0 or more and finite, got {spread}")
        self.sigma, self.offset, self.mean, self.spread = sigma, offset, 0.0, spread

    def sample(self, location: Tensor) -> Tensor:
        noise = torch.randn_like(location)
        return torch.add(location + self.offset, noise, alpha=self.sigma).clamp(0.0, 1.0)

    def decided(self, location: Tensor) -> Tensor:
        return (location + self.offset).clamp(0.0, 1.0)

    @property
    def open_at(self) -> float:
        return 1.0 - self.offset

    def probability(self, location: Tensor) -> Tensor:
        return torch.special.ndtr((location + self.offset) / self.sigma)

    def settings(self) -> dict[str, Any]:
        return {"sigma": self.sigma, "offset": self.offset, "spread": self.spread}
