"""Two merged factors by the library: what a user does by hand with the cores of a network."""

from __future__ import annotations

from .base import get_plan, register_plan
from .case import Case
from .layer import PlannedLayer
from .staged_network import StagedNetwork


@register_plan("merged")
class Merged(StagedNetwork):
    """The cores of a network merged to two matrices, one library product each."""

    groups = 2

    def same_as(self, layer: PlannedLayer, case: Case) -> str:
        text = self.program(layer, case)
        same = text == get_plan("staged").program(layer, case)
        return f"the same products as 'staged': {text}" if same else ""
