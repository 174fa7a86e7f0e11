"""Two merged factors by the package's own kernel."""

from __future__ import annotations

from typing import ClassVar

from .base import get_plan, register_plan
from .case import Case
from .fused_network import FusedNetwork
from .layer import PlannedLayer


@register_plan("pair")
class Pair(FusedNetwork):
    """The cores of a network merged to two matrices, both products in one kernel."""

    own_kernels: ClassVar[bool] = True
    groups = 2

    def same_as(self, layer: PlannedLayer, case: Case) -> str:
        text = self.program(layer, case)
        same = text == get_plan("fused").program(layer, case)
        return f"the same products as 'fused': {text}" if same else ""
