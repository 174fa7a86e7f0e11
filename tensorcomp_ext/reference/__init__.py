"""Pure-PyTorch oracles: every native op in a form written for reading.

They serve where there is no native build and they are what the tests compare with. They import torch only,
work in any floating dtype (float64 included) on any device, and are differentiable twice.
"""

from .bottleneck_conv import bottleneck_conv2d
from .chain import chain
from .contract import contract
from .cp_conv import cp_conv2d
from .lowrank_sparse_linear import lowrank_sparse_linear
from .lowrank_sparse_weight import lowrank_sparse_weight
from .tr_conv import tr_conv2d
from .tr_linear import tr_linear
from .tt_linear import tt_linear
from .ttm_embedding import ttm_embedding
from .ttm_linear import ttm_linear
from .tucker2_conv import tucker2_conv2d
from .two_factor_linear import two_factor_linear

__all__ = [
    "bottleneck_conv2d",
    "chain",
    "contract",
    "cp_conv2d",
    "lowrank_sparse_linear",
    "lowrank_sparse_weight",
    "tr_conv2d",
    "tr_linear",
    "tt_linear",
    "ttm_embedding",
    "ttm_linear",
    "tucker2_conv2d",
    "two_factor_linear",
]
