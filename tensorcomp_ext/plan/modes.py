"""Training and evaluation modes of networks that are only looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layer import PlannedLayer


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Give every submodule its own mode back on leaving: a user may have frozen some of them."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training
                if isinstance(module, PlannedLayer):
                    # Weights prepared in the other mode would stay in memory for as long as this one lasts.
                    module.clear_cache()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode and give every submodule its own mode back afterwards."""
    with modes_kept(*models):
        for model in models:
            model.eval()
        yield
