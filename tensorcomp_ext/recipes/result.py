"""What a recipe gives back."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from tensorcomp_ext.compress.report import Report

from .settings import Epoch


class RecipeResult(NamedTuple):
    """The compressed network, what was done to each layer, and the training history.

    What a recipe tells beyond that is in ``report.details`` under the recipe's name.
    """

    model: nn.Module
    report: Report
    history: list[Epoch]
