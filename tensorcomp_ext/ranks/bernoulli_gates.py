"""Gates that are 0 or 1, trained by the score of what was drawn."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .gates import Gate

_LEAST = 1e-6


class BernoulliGate(Gate):
    """``z ~ Bernoulli(pi)`` with ``pi = clamp(mu, 0, 1)``; in evaluation ``pi`` rounded.

    No gradient passes through z. That of an expectation is ``E[c d log P(z) / d mu]`` (Williams 1992); where
    ``mu`` is outside of (0, 1) it is 0.

    Args:
        mean, spread: mean and standard deviation of the first ``mu``.
    """

    fixed: ClassVar[bool] = True

    def __init__(self, mean: float = 0.55, spread: float = 0.01) -> None:
        self.mean, self.spread = mean, spread

    def sample(self, location: Tensor) -> Tensor:
        return torch.bernoulli(location.detach().clamp(0.0, 1.0))

    def decided(self, location: Tensor) -> Tensor:
        return (location.detach() > 0.5).to(location.dtype)

    @property
    def open_at(self) -> float:
        return 1.0

    def probability(self, location: Tensor) -> Tensor:
        return location.clamp(0.0, 1.0)

    def log_probability(self, location: Tensor, drawn: Tensor) -> Tensor:
        """``log P(z)`` of each gate, finite: probabilities are taken no closer to 0 and 1 than 1e-6.

        Args:
            drawn: 0 or 1 for each gate.
        """
        open_ = location.clamp(_LEAST, 1.0 - _LEAST)
        return torch.where(drawn > 0, open_, 1.0 - open_).log()

    def settings(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread}
