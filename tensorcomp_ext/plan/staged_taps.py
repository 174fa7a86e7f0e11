"""Convolutions by shared taps and a network at every pixel, for the plan ``staged``."""

from __future__ import annotations

import math

from torch import Tensor

from ..formats import TapNetwork
from ..ops._library_chain import library_chain
from .base import Plan, Stage
from .case import Case
from .geometry import Bound, Geometry
from .layer import PlannedLayer
from .memory_format import memory_layout
from .networks import Found, find_traced, matrices, product_stage
from .parts import in_autocast_dtype
from .rebuild import cube_side, merge_stage, merges_natively


class StagedTaps(Plan):
    """Every channel alone through the taps, then the cores at every pixel by library products."""

    def serves(self, layer: PlannedLayer) -> bool:
        return isinstance(layer.weight.lower(), TapNetwork)

    def program(self, layer: PlannedLayer, case: Case) -> str:
        return _found(_form(layer)).text

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        form, geometry = _form(layer), layer.geometry
        output = geometry.output_shape(case.shape, layer.weight.shape)
        pixels, rank = geometry.positions(output), form.taps.shape[0]
        entries, taps = math.prod(case.shape), form.taps.numel()
        spread = pixels * case.shape[1] * rank
        stages = [Stage("conv", pixels * case.shape[1] * taps, 1, entries + taps + 3 * spread)]
        found = _found(form)
        for place, (new, contracted) in enumerate(found.chain.program.matrix_shapes()):
            kept = math.prod(found.chain.program.dims_after(place)) // contracted
            stages.append(product_stage("linear", pixels * kept, new, contracted))
        if case.training:
            natively = merges_natively(form.network)
            stages += [
                merge_stage(
                    stored := sum(form.network.cores[c].numel() for c in group),
                    2 * stored,
                    cube_side(stored),
                    1,
                    natively,
                    training=True,
                )
                for group in found.order
                if len(group) > 1
            ]
        return stages

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        form, found = _form(layer), layer.traced_found
        if found is None:
            found = _found(form)
        made = matrices(found.chain, form.network.cores, x.device.type)
        x, taps, bias, *low = in_autocast_dtype(x, form.taps.unsqueeze(1), layer.bias, *made)
        return _convolve(layer.geometry, x, taps, low, bias, found)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        form, dtype, geometry = _form(layer), case.torch_dtype, layer.geometry
        found = _found(form)

        def make() -> tuple[Tensor, ...]:
            made = matrices(found.chain, form.network.cores, case.device)
            return tuple(t.detach().to(dtype).contiguous() for t in (form.taps.unsqueeze(1), *made))

        taps, *made = layer.prepared("staged", dtype, make)
        return lambda x, bias: _convolve(geometry, x, taps, made, bias, found)


def _convolve(
    geometry: Geometry, x: Tensor, taps: Tensor, made: list[Tensor], bias: Tensor | None, found: Found
) -> Tensor:
    batch, channels = x.shape[:2]
    z = geometry.apply(x.reshape(batch * channels, 1, *x.shape[2:]), taps)  # [N S, R, H', W']
    z = z.reshape(batch, channels, *z.shape[1:])  # [N, S, R, H', W']
    pixels = z.movedim((2, 1), (-2, -1)).flatten(-2)  # [N, H', W', R S]
    y = library_chain(pixels, made, bias, program=found.chain.program)
    y = y.movedim(-1, 1)  # [N, T, H', W'], channels last in memory
    return y if memory_layout(x) == "channels_last" else y.contiguous()


def _found(form: TapNetwork) -> Found:
    found = find_traced(form.network, None, whole=True)
    assert found is not None  # one group of all cores always serves
    return found


def _form(layer: PlannedLayer) -> TapNetwork:
    form = layer.weight.lower()
    assert isinstance(form, TapNetwork)
    return form
