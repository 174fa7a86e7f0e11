"""Functional ops, also reachable as ``torch.ops.tensorcomp.<name>``."""

from .._native import Support
from ._chain_program import Program, Step
from .bottleneck_conv import bottleneck_conv2d
from .chain import chain
from .cp_conv import cp_conv2d
from .tr_conv import tr_conv2d
from .tr_linear import tr_linear
from .tt_linear import tt_linear
from .ttm_embedding import ttm_embedding
from .ttm_embedding_bag import ttm_embedding_bag
from .ttm_linear import ttm_linear
from .tucker2_conv import tucker2_conv2d
from .two_factor_linear import two_factor_linear

__all__ = [
    "Program",
    "Step",
    "Support",
    "bottleneck_conv2d",
    "chain",
    "cp_conv2d",
    "tr_conv2d",
    "tr_linear",
    "tt_linear",
    "ttm_embedding",
    "ttm_embedding_bag",
    "ttm_linear",
    "tucker2_conv2d",
    "two_factor_linear",
]
