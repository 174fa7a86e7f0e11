"""The factors one after another through the library's kernels."""

from __future__ import annotations

from typing import ClassVar

from .base import Plan, register_plan
from .by_form import ByForm
from .embedding import StagedEmbedding
from .staged_conv import StagedConv
from .staged_network import StagedNetwork
from .staged_pair import StagedPair
from .staged_sparse import StagedSparse
from .staged_taps import StagedTaps


@register_plan("staged")
class Staged(ByForm):
    """Three library convolutions for a bottleneck convolution, products in the best order for a network.

    Of an embedding the slices of every index, and batched products of them; of a low-rank + sparse linear
    layer both factors and the pruned matrix.
    """

    forms: ClassVar[tuple[Plan, ...]] = (
        StagedConv(),
        StagedPair(),
        StagedNetwork(),
        StagedTaps(),
        StagedSparse(),
        StagedEmbedding(),
    )
    what: ClassVar[str] = "linear and convolutional layers and embeddings"
