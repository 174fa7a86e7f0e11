"""What a layer computes: factorized drop-in replacements of torch.nn layers."""

from .base import FactorizedLayer, from_config
from .conv import FactorizedConv1d, FactorizedConv2d, FactorizedConv3d
from .embedding import FactorizedEmbedding
from .embedding_bag import FactorizedEmbeddingBag
from .fading import FadingDense
from .folded import FoldedLayer, fold_layer
from .linear import FactorizedLinear

__all__ = [
    "FactorizedConv1d",
    "FactorizedConv2d",
    "FactorizedConv3d",
    "FactorizedEmbedding",
    "FactorizedEmbeddingBag",
    "FactorizedLayer",
    "FactorizedLinear",
    "FadingDense",
    "FoldedLayer",
    "fold_layer",
    "from_config",
]
