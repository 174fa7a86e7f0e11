"""The package's own kernels: all stages in one pass over the input."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..ops import Support
from .base import Plan, Stage, register_plan
from .case import Case
from .embedding import FusedEmbedding
from .fused_conv import FusedConv
from .fused_pair import FusedPair
from .geometry import Bound, FoldedBound
from .layer import PlannedLayer
from .training import TrainingCall

_FORMS: tuple[Plan, ...] = (FusedConv(), FusedPair(), FusedEmbedding())


@register_plan("fused")
class Fused(Plan):
    """Two-dimensional bottleneck convolutions, two-factor linear layers and embeddings.

    Inference packs the weights of the former two once.
    """

    own_kernels: ClassVar[bool] = True

    def serves(self, layer: PlannedLayer) -> bool:
        return any(form.serves(layer) for form in _FORMS)

    @staticmethod
    def _of(layer: PlannedLayer) -> Plan:
        for form in _FORMS:
            if form.serves(layer):
                return form
        raise TypeError(
            "plan 'fused' serves two-dimensional bottleneck convolutions and two-factor linear layers, "
            f"got {type(layer).__name__}"
        )

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        return self._of(layer).support(layer, case)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        return self._of(layer).stages(layer, case)

    def backward_factor(self) -> float:
        return 4.0  # the rank-space activations are computed again in backward

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        return self._of(layer).run(layer, x)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        return self._of(layer).bind(layer, case)

    def bind_folded(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound | None:
        return self._of(layer).bind_folded(layer, case, relu)

    def bind_training(self, layer: PlannedLayer, case: Case) -> TrainingCall:
        return self._of(layer).bind_training(layer, case)
