"""Kernels of bottleneck convolutions where no native one serves, and their shape functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._conv_arguments import IntOrPair, check_arguments, resolve_geometry
from ._oracle_gradients import mask_bits

_layout_of = torch._prims_common.suggest_memory_format


def default_forward(oracle: Callable[..., Tensor], forms: int) -> Callable[..., Tensor]:
    """The oracle in the memory format of x; ``forms`` options in front of ``allow_tf32`` are its own."""

    def forward(
        x: Tensor,
        core: Tensor,
        factor_out: Tensor,
        factor_in: Tensor,
        bias: Tensor | None = None,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        *options: Any,
    ) -> Tensor:
        y = oracle(x, core, factor_out, factor_in, bias, stride, padding, dilation, *options[:forms])
        return y.contiguous(memory_format=_layout_of(x))

    return forward


def default_backward(
    gradients: Callable[..., list[Tensor | None]],
) -> Callable[..., tuple[Tensor, ...]]:
    """The oracle's gradients; those not wanted are empty."""

    def backward(
        grad: Tensor,
        x: Tensor,
        core: Tensor,
        factor_out: Tensor,
        factor_in: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        output_mask: int,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        windows = resolve_geometry(core.shape[2:], stride, padding, dilation)
        tensors, wanted = (x, core, factor_out, factor_in), mask_bits(output_mask, 5)
        found = gradients(grad, tensors, windows, options, wanted, create_graph=False)
        if found[0] is not None:
            found[0] = found[0].contiguous(memory_format=_layout_of(x))
        return tuple(
            x.new_empty(0) if g is None else g if i == 0 else g.contiguous() for i, g in enumerate(found)
        )

    return backward


def fake_forward(name: str, form: Callable[..., tuple[int, bool]]) -> Callable[..., Tensor]:
    """The shape function of ``name``; ``form`` reads ring and depthwise from the options."""

    def fake(
        x: Tensor,
        core: Tensor,
        factor_out: Tensor,
        factor_in: Tensor,
        bias: Tensor | None = None,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        *options: Any,
    ) -> Tensor:
        geometry = resolve_geometry(core.shape[2:], stride, padding, dilation, name)
        check_arguments(x, core, factor_out, factor_in, bias, geometry, name, *form(*options))
        size = geometry.output_size(x.shape[2:], core.shape[2:])
        return new_image(x, factor_out.shape[0], size)

    return fake


def fake_backward(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Gradients of x, core, factor_out, factor_in and bias; those not wanted are empty."""
    shapes = (x.shape, core.shape, factor_out.shape, factor_in.shape, (factor_out.shape[0],))
    return tuple(
        x.new_empty(0)
        if not wanted
        else torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout_of(x))
        if index == 0
        else x.new_empty(shape)
        for index, (shape, wanted) in enumerate(zip(shapes, mask_bits(output_mask, 5), strict=True))
    )


def new_image(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An empty ``[N, channels, *size]`` of the dtype, device and memory format of ``x``."""
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout_of(x))
