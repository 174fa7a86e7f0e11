"""Functional ops, also reachable as ``torch.ops.tensorcomp.<name>``."""

from .._native import Support
from ._chain_program import Program, Step
from .bottleneck_conv import bottleneck_conv2d
from .chain import chain
from .cp_conv import cp_conv2d
from .lowrank_sparse_linear import lowrank_sparse_linear
from .lowrank_sparse_packing import (
    PackedSparse,
    check_packed,
    pack_mask,
    pack_sparse,
    unpack_mask,
    unpack_sparse,
)
from .lowrank_sparse_weight import lowrank_sparse_weight
from .tr_conv import tr_conv2d
from .tr_linear import tr_linear
from .tt_linear import tt_linear
from .ttm_embedding import ttm_embedding
from .ttm_embedding_bag import ttm_embedding_bag
from .ttm_linear import ttm_linear
from .tucker2_conv import tucker2_conv2d
from .two_factor_linear import two_factor_linear

__all__ = [
    "PackedSparse",
    "Program",
    "Step",
    "Support",
    "bottleneck_conv2d",
    "chain",
    "check_packed",
    "cp_conv2d",
    "lowrank_sparse_linear",
    "lowrank_sparse_weight",
    "pack_mask",
    "pack_sparse",
    "tr_conv2d",
    "tr_linear",
    "tt_linear",
    "ttm_embedding",
    "ttm_embedding_bag",
    "ttm_linear",
    "tucker2_conv2d",
    "two_factor_linear",
    "unpack_mask",
    "unpack_sparse",
]
