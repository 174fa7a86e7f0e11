"""Core networks by the library's products, for the plans ``staged`` and ``merged``."""

from __future__ import annotations

from torch import Tensor

from ..ops import Support
from ..ops._contraction_layout import Chain
from ..ops._library_chain import library_chain
from .base import Plan, Stage
from .case import Case
from .geometry import Bound
from .layer import PlannedLayer
from .networks import (
    LIBRARY,
    Found,
    chain_stages,
    find,
    is_eager,
    is_network,
    matrices,
    network_of,
)
from .parts import in_autocast_dtype
from .training import TrainingCall


class StagedNetwork(Plan):
    """One library product for each step of the cheapest order.

    ``groups``: how many matrices the cores are merged to; None for as many as are cheapest.
    """

    groups: int | None = None
    kind = LIBRARY

    def serves(self, layer: PlannedLayer) -> bool:
        return is_network(layer)

    def found(self, layer: PlannedLayer, case: Case) -> Found | None:
        """The order this plan follows."""
        return find(layer, case, self.kind, self.groups, self.backward_factor(layer))

    def chain(self, layer: PlannedLayer, case: Case) -> Chain:
        found = self.found(layer, case)
        if found is None:
            reason = no_order(self.groups, case, len(network_of(layer).cores))
            raise ValueError(f"plan {_name(self)!r} cannot serve: {reason}")
        return found.chain

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        if self.found(layer, case) is None:
            return Support(False, no_order(self.groups, case, len(network_of(layer).cores)))
        return Support(True)

    def program(self, layer: PlannedLayer, case: Case) -> str:
        found = self.found(layer, case)
        return "" if found is None else found.text

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        found = self.found(layer, case)
        return [] if found is None else chain_stages(layer, found, case, self.kind)

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        if is_eager(x):
            return self.apply(layer, x, self.chain(layer, layer.case(x)))
        found = layer.traced_found
        if found is None:
            raise ValueError(f"plan {_name(self)!r} cannot serve: the weight is one core")
        return self.apply(layer, x, found.chain)

    def apply(self, layer: PlannedLayer, x: Tensor, chain: Chain) -> Tensor:
        """The layer by a chain, differentiable."""
        made = matrices(chain, network_of(layer).cores, x.device.type)
        x, bias, *low = in_autocast_dtype(x, layer.bias, *made)
        return library_chain(x, low, bias, program=chain.program)

    def bind_training(self, layer: PlannedLayer, case: Case) -> TrainingCall:
        chain = self.chain(layer, case)
        return lambda layer, x: self.apply(layer, x, chain)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        chain = self.chain(layer, case)
        made, program = prepared_matrices(layer, chain, case), chain.program
        return lambda x, bias: library_chain(x, made, bias, program=program)


def prepared_matrices(layer: PlannedLayer, chain: Chain, case: Case) -> tuple[Tensor, ...]:
    """The matrices of a chain in the dtype of a case, kept with the layer."""
    dtype, device = case.torch_dtype, case.device

    def make() -> tuple[Tensor, ...]:
        made = matrices(chain, network_of(layer).cores, device)
        return tuple(m.detach().to(dtype).contiguous() for m in made)

    return layer.prepared(f"matrices {chain.program}", dtype, make)


def _name(plan: Plan) -> str:
    """The name a plan is registered under; the form of another has none of its own."""
    return getattr(plan, "name", "fused" if plan.own_kernels else "staged")


def no_order(groups: int | None, case: Case, cores: int) -> str:
    """Why there is no order."""
    if cores == 1:
        return "the weight is one core"
    if case.prefer == "memory":
        return "prefer='memory': merged factors would be too large to be kept"
    return f"the cores do not merge to {groups} factors"
