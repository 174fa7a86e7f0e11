"""Rank selection: EVBMF, energy, budgets of parameters or operations, and measured latency.

A rank specification is an int, a tuple, a float in (0, 1] (fraction of the dense parameters), a rule, text
for one of these, or a mapping from layer-name patterns to any of them; `resolve_rank` turns it into the ranks
of one weight.
"""

from .evbmf import EVBMFResult, evbmf
from .factored import Orthogonal
from .layouts import RankLayout, rank_layout
from .network_layouts import NetworkLayout
from .network_rules import Latency, NetworkFlops, NetworkParams, NetworkRule
from .rules import VBMF, Energy, Flops, Params, RankRule, Ratio
from .sparse_layouts import NoRanks
from .specs import RankSpec, parse_rank, resolve_rank

__all__ = [
    "VBMF",
    "EVBMFResult",
    "Energy",
    "Flops",
    "Latency",
    "NetworkFlops",
    "NetworkLayout",
    "NetworkParams",
    "NetworkRule",
    "NoRanks",
    "Orthogonal",
    "Params",
    "RankLayout",
    "RankRule",
    "RankSpec",
    "Ratio",
    "evbmf",
    "parse_rank",
    "rank_layout",
    "resolve_rank",
]
