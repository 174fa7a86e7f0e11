"""The dense weight and the library's own kernel: the plan that is never slower than the layer it replaced."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import Support
from .base import Plan, Stage, register_plan
from .case import Case, autocast_dtype
from .channels_last import laid_out, weight_layout
from .embedding import dense_stages, dense_support, lookup
from .geometry import Bound
from .layer import PlannedLayer
from .memory_format import CHANNELS_LAST, suggests_channels_last
from .rebuild import rebuild_stage


@register_plan("dense")
class Dense(Plan):
    """Inference: the dense weight, kept. Training, or ``prefer="memory"``: rebuilt at every call."""

    def serves(self, layer: PlannedLayer) -> bool:
        return True

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        return Support(True) if lookup(layer) is None else dense_support(layer, case)

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        if lookup(layer) is not None:
            return dense_stages(layer, case)
        shape = layer.weight.shape
        output = layer.geometry.output_shape(case.shape, shape)
        weights, width = math.prod(shape), min(shape[:2])
        moved = math.prod(case.shape) + weights + math.prod(output)
        kind = "linear" if len(shape) == 2 else "conv" if math.prod(shape[2:]) > 1 else "pointwise"
        stages = [Stage(kind, layer.geometry.positions(output) * weights, width, moved)]
        if case.device == "cpu" and layer.geometry.spatial:
            # At each call oneDNN copies the weight into the order its kernel reads.
            stages.append(Stage(kind, 0, width, 2 * weights))
        if case.training or case.prefer == "memory":
            stages.append(rebuild_stage(layer, case))
        return stages

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        weight = layer.weight
        # The library copies a weight to the order its kernels read, sooner from the layout of the images.
        last = x.dim() in CHANNELS_LAST and suggests_channels_last(x.shape, x.stride())
        rebuild = weight.to_dense_channels_last if last else weight.to_dense
        if autocast_dtype(x.device.type) is None:
            return layer.geometry.apply(x, rebuild(), layer.bias)
        # Outside autocast: a weight rebuilt in bfloat16 would carry the rounding of two products.
        with torch.autocast(x.device.type, enabled=False):
            dense = rebuild()
        return layer.geometry.apply(x, dense, layer.bias)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        dtype = case.torch_dtype
        if case.prefer == "memory":
            apply, weight = layer.geometry.apply, layer.weight

            def rebuild(x: Tensor, bias: Tensor | None) -> Tensor:
                with torch.autocast(x.device.type, enabled=False):
                    dense = weight.to_dense().to(dtype)
                return apply(x, dense, bias)

            return rebuild
        layout = weight_layout(case)

        def make() -> tuple[Tensor, ...]:
            with torch.autocast(case.device, enabled=False):
                weight = layer.weight.to_dense().to(dtype)
            return (laid_out(layer.geometry.prepare(weight), layout),)

        prepared = layer.prepared(f"dense {layout}", dtype, make)
        return layer.geometry.bind(prepared[0])
