"""Gates on ranks: random numbers in [0, 1] that open and shut the entries of a bond between factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor


class Gate(ABC):
    """A distribution of gates with one trained number each, its location.

    All methods take the locations of any number of gates and answer for each of them.
    """

    fixed: ClassVar[bool]
    """Whether of each bond one entry has no gate and is always open, so that no rank falls to 0."""

    mean: float
    """Mean of the first locations."""
    spread: float
    """Their standard deviation."""

    def start(
        self,
        count: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Locations to begin with, normal, drawn on the CPU for every device."""
        drawn = torch.randn(count, dtype=dtype, generator=generator)
        return (self.mean + self.spread * drawn).to(device)

    @abstractmethod
    def sample(self, location: Tensor) -> Tensor:
        """Gates drawn for a training step, from torch's global generator."""

    @abstractmethod
    def decided(self, location: Tensor) -> Tensor:
        """Gates of evaluation, without noise: an entry stays in the end where its gate is above 0."""

    @property
    @abstractmethod
    def open_at(self) -> float:
        """A location whose gate of evaluation is 1."""

    @property
    def begins_open(self) -> bool:
        """Whether evaluation has gates open that are where the first locations are on average."""
        return bool(self.decided(torch.tensor(self.mean)) > 0.0)

    @abstractmethod
    def probability(self, location: Tensor) -> Tensor:
        """``P(z > 0)`` in training."""

    def settings(self) -> dict[str, Any]:
        """What it was made with, in JSON types."""
        return {}
