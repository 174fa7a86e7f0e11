"""How a weight is stored: one class a format, registered by name."""

from ._modes import balanced_modes, covering_modes
from .base import Format, Rank, format_names, get_format, register_format
from .cp import CP
from .forms import BottleneckConv, Form, Network, PackedSum, SparseSum, TapNetwork, TwoFactor
from .lowrank_sparse import LowRankSparse
from .merge import two_factor
from .packed_sparse import PackedLowRankSparse
from .svd import SVD
from .tr import TR
from .tr_matrix import TRMatrix
from .tt import TT
from .ttm import TTM
from .tucker import Tucker
from .tucker2 import Tucker2

__all__ = [
    "CP",
    "SVD",
    "TR",
    "TT",
    "TTM",
    "BottleneckConv",
    "Form",
    "Format",
    "LowRankSparse",
    "Network",
    "PackedLowRankSparse",
    "PackedSum",
    "Rank",
    "SparseSum",
    "TRMatrix",
    "TapNetwork",
    "Tucker",
    "Tucker2",
    "TwoFactor",
    "balanced_modes",
    "covering_modes",
    "format_names",
    "get_format",
    "register_format",
    "two_factor",
]
