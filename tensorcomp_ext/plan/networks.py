"""Linear layers of core networks: which order of products a plan follows, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..formats import Network, TapNetwork
from ..ops._contraction import Macs, Order, Structure, cheapest_order, describe, merge_plan
from ..ops._contraction_layout import Chain, chain_of
from ..ops._transforms import transformed
from .base import Stage
from .case import Case, autocast_dtype
from .cost import entry_size, machine_rates, stage_seconds
from .geometry import LinearGeometry
from .rates import Rates
from .rebuild import cube_side, merge_stage, merges_natively

if TYPE_CHECKING:
    from .layer import PlannedLayer

LIBRARY = "linear"
KERNEL = "chain"
_FRUGAL = 32
"""With ``prefer="memory"`` a merged matrix larger than its cores has at most this share of the weight."""
_TRACED_ROWS = 64
"""Rows for which the order of a traced graph is chosen: it must serve any number."""


class Found(NamedTuple):
    """An order, and the chain that follows it."""

    order: Order
    chain: Chain

    @property
    def text(self) -> str:
        return describe(self.order)


@dataclass(frozen=True)
class Seconds:
    """Predicted seconds of an order on this machine; weights merged once, or at every call in training."""

    kind: str
    """Of the rates: ``LIBRARY`` or ``KERNEL``."""
    rows: int
    size: int
    """Bytes of an entry."""
    factor: float
    """Work of a call over that of one forward: above 1 in training."""
    training: bool
    natively: bool
    """Whether our kernel merges the cores."""
    limit: int | None
    """Entries that a merged matrix may have where it has more than its cores; None for any number."""
    rates: Rates = field(hash=False)

    def step(self, kept: int, new: int, contracted: int) -> float:
        stage = product_stage(self.kind, self.rows * kept, new, contracted)
        return stage_seconds(stage, self.rates, self.size, self.factor)

    def merge(self, macs: int, size: int, stored: int) -> float:
        if self.limit is not None and size > max(stored, self.limit):
            return math.inf
        if not self.training or macs == 0:
            return 0.0
        stage = _merge_stage(macs, size, stored, 1, self.natively)
        return stage_seconds(stage, self.rates, self.size, self.factor)


def product_stage(kind: str, rows: int, new: int, contracted: int) -> Stage:
    """One product of so many rows with a matrix ``[new, contracted]``."""
    macs, width, moved = rows * new * contracted, min(new, contracted), rows * (new + contracted)
    if kind == LIBRARY:
        return Stage(kind, macs, width, moved + new * contracted)
    return Stage(kind, macs, width, new * contracted, calls=0, inner=moved)


def _merge_stage(macs: int, size: int, stored: int, products: int, natively: bool) -> Stage:
    """Products of cores at a training call: small matrices."""
    return merge_stage(macs, size + stored, cube_side(macs), products, natively, training=True)


def is_network(layer: PlannedLayer) -> bool:
    """Whether this is a linear layer whose weight is a network of cores."""
    return isinstance(layer.geometry, LinearGeometry) and isinstance(layer.weight.lower(), Network)


def network_of(layer: PlannedLayer) -> Network:
    """The network of a layer that :func:`is_network`."""
    form = layer.weight.lower()
    assert isinstance(form, Network)
    return form


def structure_of(network: Network) -> Structure:
    """The network without its entries."""
    return Structure(network.labels, tuple(sorted(network.sizes.items())), network.outputs, network.inputs)


def find(layer: PlannedLayer, case: Case, kind: str, groups: int | None, factor: float) -> Found | None:
    """The order that a plan follows for a case; None where there is none.

    Args:
        kind: whose rates count, ``LIBRARY`` or ``KERNEL``.
        groups: how many matrices it must have; None for any number but one, which is the dense weight.
        factor: of the plan's work in training, see ``Plan.backward_factor``.
    """
    rows, network = math.prod(case.shape[:-1]), network_of(layer)
    cost = Seconds(
        kind,
        1 << max(0, rows - 1).bit_length(),  # powers of two: few orders are searched for
        entry_size(case),
        factor if case.training else 1.0,
        case.training,
        merges_natively(network),
        math.prod(layer.weight.shape) // _FRUGAL if case.prefer == "memory" else None,
        machine_rates(layer, case),
    )
    structure = structure_of(network)
    return _found(structure, cheapest_order(structure, cost, groups, whole=False))


def find_traced(network: Network, groups: int | None, whole: bool = False) -> Found | None:
    """The order for graphs that must serve any number of rows, chosen without rates."""
    structure = structure_of(network)
    return _found(structure, cheapest_order(structure, Macs(_TRACED_ROWS), groups, whole=whole))


def traced_found(layer: PlannedLayer) -> Found | None:
    """The order a traced graph of a layer follows; None where there is nothing to choose."""
    form = layer.weight.lower()
    if isinstance(form, TapNetwork):
        return find_traced(form.network, None, whole=True)
    if not is_network(layer):
        return None
    return find_traced(network_of(layer), 2 if layer.plan in ("merged", "pair") else None)


def is_eager(x: Tensor) -> bool:
    """Whether nothing traces, transforms or imitates ``x``: its shape is made of numbers."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"
    traces = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return not traces and plain and not transformed()


def _found(structure: Structure, order: Order | None) -> Found | None:
    return None if order is None else Found(order, chain_of(structure, order))


def chain_stages(layer: PlannedLayer, found: Found, case: Case, kind: str) -> list[Stage]:
    """What the chain does, merging at the call included in training."""
    rows, program = math.prod(case.shape[:-1]), found.chain.program
    stages = []
    for place, (new, contracted) in enumerate(program.matrix_shapes()):
        kept = math.prod(program.dims_after(place)) // contracted
        stages.append(product_stage(kind, rows * kept, new, contracted))
    if kind == KERNEL:
        stages[0] = stages[0]._replace(calls=1, elements=stages[0].elements + rows * program.in_features)
        stages[-1] = stages[-1]._replace(elements=stages[-1].elements + rows * program.out_features)
    if not case.training:
        return stages
    return merge_stages(layer, found) + stages


def merge_stages(layer: PlannedLayer, found: Found) -> list[Stage]:
    """The products that make the matrices of groups of several cores."""
    network = network_of(layer)
    structure, natively, stages = structure_of(network), merges_natively(network), []
    for group, (new, contracted) in zip(found.order, found.chain.program.matrix_shapes(), strict=True):
        if len(group) > 1:
            stored = sum(network.cores[core].numel() for core in group)
            plan = merge_plan(structure, group)
            stages.append(_merge_stage(plan.macs, new * contracted, stored, len(plan.pairs), natively))
    return stages


def matrices(chain: Chain, cores: Sequence[Tensor], device: str) -> list[Tensor]:
    """The matrices of a chain, in the dtype of the cores also under autocast, where they would be rounded."""
    if autocast_dtype(device) is None:
        return chain.matrices(cores)
    with torch.autocast(device, enabled=False):
        return chain.matrices(cores)
