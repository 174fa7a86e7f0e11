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
from .fused_sparse import FusedSparse


@register_plan("fused")
class Fused(ByForm):
    """Two-dimensional bottleneck convolutions, linear layers and embeddings.

    Inference packs the weights of the former two once. Of weights with a sparse part packed ones, in linear
    layers and pointwise convolutions.
    """

    own_kernels: ClassVar[bool] = True
    forms: ClassVar[tuple[Plan, ...]] = (
        FusedConv(),
        FusedBottleneck(),
        FusedPair(),
        FusedNetwork(),
        FusedSparse(),
        FusedEmbedding(),
    )
    what: ClassVar[str] = "two-dimensional bottleneck convolutions, linear layers and embeddings"
