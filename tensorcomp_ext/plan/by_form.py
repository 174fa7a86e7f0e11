"""A plan that means something else for each computational form."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..ops import Support
from .base import Plan, Stage
from .case import Case
from .geometry import Bound, FoldedBound
from .layer import PlannedLayer
from .training import TrainingCall


class ByForm(Plan):
    """Leaves a layer to the first of ``forms`` that serves it."""

    forms: ClassVar[tuple[Plan, ...]]
    what: ClassVar[str]
    """What is served, for messages."""

    def serves(self, layer: PlannedLayer) -> bool:
        return any(form.serves(layer) for form in self.forms)

    def of(self, layer: PlannedLayer) -> Plan:
        """The plan for the form of a layer.

        Raises:
            TypeError: there is none.
        """
        for form in self.forms:
            if form.serves(layer):
                return form
        raise TypeError(f"plan {self.name!r} serves {self.what}, got {type(layer).__name__}")

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        return self.of(layer).support(layer, case)

    def same_as(self, layer: PlannedLayer, case: Case) -> str:
        return self.of(layer).same_as(layer, case)

    def program(self, layer: PlannedLayer, case: Case) -> str:
        return self.of(layer).program(layer, case)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        return self.of(layer).stages(layer, case)

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        return self.of(layer).run(layer, x)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        return self.of(layer).bind(layer, case)

    def bind_folded(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound | None:
        return self.of(layer).bind_folded(layer, case, relu)

    def bind_training(self, layer: PlannedLayer, case: Case) -> TrainingCall:
        return self.of(layer).bind_training(layer, case)

    def backward_factor(self, layer: PlannedLayer) -> float:
        return self.of(layer).backward_factor(layer)
