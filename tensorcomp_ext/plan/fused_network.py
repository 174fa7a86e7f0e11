"""Core networks by ``ops.chain``, for the plans ``fused`` and ``pair``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from ..ops import Support
from ..ops import chain as chain_op
from ..ops._contraction_layout import Chain
from ..ops.chain import bind_packed_chain, differentiable_chain, native_support, pack_chain, program_numbers
from .case import Case, autocast_dtype
from .geometry import Bound, FoldedBound
from .layer import PlannedLayer
from .networks import KERNEL, matrices, network_of
from .parts import CHAINED, in_autocast_dtype
from .staged_network import StagedNetwork
from .training import TrainingCall


class FusedNetwork(StagedNetwork):
    """All products of the cheapest order in one kernel, blocks of rows through all of them."""

    own_kernels: ClassVar[bool] = True
    kind = KERNEL

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        found = self.found(layer, case)
        if found is None:
            return super().support(layer, case)
        # An empty batch carries device, dtype and sizes without memory.
        probe = network_of(layer).cores[0].new_empty((0, case.shape[-1]), dtype=case.torch_dtype)
        return native_support(probe, (), found.chain.program)

    def backward_factor(self, layer: PlannedLayer) -> float:
        return CHAINED

    def apply(self, layer: PlannedLayer, x: Tensor, chain: Chain) -> Tensor:
        made = matrices(chain, network_of(layer).cores, x.device.type)
        x, bias, *low = in_autocast_dtype(x, layer.bias, *made)
        return chain_op(x, low, bias, program=chain.program)

    def bind_training(self, layer: PlannedLayer, case: Case) -> TrainingCall:
        chain = self.chain(layer, case)
        if autocast_dtype(case.device) is not None:
            return lambda layer, x: self.apply(layer, x, chain)
        numbers = program_numbers(chain.program)

        def call(layer: PlannedLayer, x: Tensor) -> Tensor:
            made = chain.matrices(network_of(layer).cores)
            return differentiable_chain(x, made, layer.bias, numbers)

        return call

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        call: Callable[..., Tensor] = self._bind(layer, case, relu=False)
        return call

    def bind_folded(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound | None:
        return self._bind(layer, case, relu)

    def _bind(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound:
        chain, dtype = self.chain(layer, case), case.torch_dtype

        def make() -> tuple[Tensor, ...]:
            made = matrices(chain, network_of(layer).cores, case.device)
            return (pack_chain([m.detach().to(dtype) for m in made], chain.program),)

        (packed,) = layer.prepared(f"chain {chain.program}", dtype, make)
        tf32 = case.tf32 if case.device == "cuda" else None
        return bind_packed_chain(packed, chain.program, tf32, relu)
