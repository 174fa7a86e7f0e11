"""The package's own kernels: all stages in one pass over the input."""

from __future__ import annotations

from typing import ClassVar

from .base import Plan, register_plan
from .by_form import ByForm
from .embedding import FusedEmbedding
from .fused_bottleneck import FusedBottleneck
from .fused_conv import FusedConv
from .fused_network import FusedNetwork
from .fused_pair import FusedPair


@register_plan("fused")
class Fused(ByForm):
    """Two-dimensional bottleneck convolutions, linear layers and embeddings.

    Inference packs the weights of the former two once.
    """

    own_kernels: ClassVar[bool] = True
    forms: ClassVar[tuple[Plan, ...]] = (
        FusedConv(),
        FusedBottleneck(),
        FusedPair(),
        FusedNetwork(),
        FusedEmbedding(),
    )
    what: ClassVar[str] = "two-dimensional bottleneck convolutions, linear layers and embeddings"
