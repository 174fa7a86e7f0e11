"""Gradients of the Tucker-2 convolution: the backward op, or the oracle where they are differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._conv_arguments import IntOrPair
from ._transforms import transformed

Windows = tuple[IntOrPair, IntOrPair, IntOrPair]
"""Stride, padding and dilation in any spelling the op takes."""

_OPS = torch.ops.tensorcomp
_EVERY_GRADIENT = 31
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd


class Tucker2Conv2d(torch.autograd.Function):
    """The op's autograd; called directly it spares a call the dispatcher's way into Python."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor,
        factor_out: Tensor,
        factor_in: Tensor,
        bias: Tensor | None,
        windows: Windows,
    ) -> Tensor:
        ctx.save_for_backward(x, core, factor_out, factor_in)
        ctx.windows = windows
        with _below_autograd():
            y: Tensor = _OPS.tucker2_conv2d.default(x, core, factor_out, factor_in, bias, *windows)
            return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, core, factor_out, factor_in = ctx.saved_tensors
        wanted, windows = ctx.needs_input_grad, ctx.windows
        if (_is_grad_enabled() or transformed()) and not _is_compiling():
            # Somebody differentiates or maps the gradients: the oracle is made of torch operations.
            tensors = (x, core, factor_out, factor_in)
            return *oracle_gradients(grad, tensors, windows, wanted, _is_grad_enabled()), None
        mask = wanted[0] | wanted[1] << 1 | wanted[2] << 2 | wanted[3] << 3 | wanted[4] << 4
        found = _OPS.tucker2_conv2d_backward.default(grad, x, core, factor_out, factor_in, *windows, mask)
        if mask == _EVERY_GRADIENT:
            return *found, None
        return *[g if w else None for g, w in zip(found, wanted, strict=False)], None


# Function.apply puts two microseconds around this. Where no transform is on, all that matters of it is what
# it does for tensors that have outlived one.
_apply = super(torch.autograd.Function, Tucker2Conv2d).apply
_unwrap = torch._C._functorch.unwrap_if_dead


def differentiable_conv2d(
    x: Tensor, core: Tensor, factor_out: Tensor, factor_in: Tensor, bias: Tensor | None, windows: Windows
) -> Tensor:
    """The op with its autograd; the arguments fit, no transform is on and gradients are wanted."""
    if bias is not None:
        bias = _unwrap(bias)
    y: Tensor = _apply(_unwrap(x), _unwrap(core), _unwrap(factor_out), _unwrap(factor_in), bias, windows)
    return y


def native_conv2d(
    x: Tensor, core: Tensor, factor_out: Tensor, factor_in: Tensor, bias: Tensor | None, windows: Windows
) -> Tensor:
    """The op, differentiable where gradients are wanted; the arguments fit and no transform is on."""
    if _is_grad_enabled() and (
        x.requires_grad
        or core.requires_grad
        or factor_out.requires_grad
        or factor_in.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return differentiable_conv2d(x, core, factor_out, factor_in, bias, windows)
    with _below_autograd():
        y: Tensor = _OPS.tucker2_conv2d.default(x, core, factor_out, factor_in, bias, *windows)
        return y


def autograd_kernel(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
) -> Tensor:
    """What the dispatcher calls for ``torch.ops.tensorcomp.tucker2_conv2d`` where autograd looks on."""
    if transformed():
        return reference.tucker2_conv2d(x, core, factor_out, factor_in, bias, stride, padding, dilation)
    return native_conv2d(x, core, factor_out, factor_in, bias, (stride, padding, dilation))


def oracle_gradients(
    grad: Tensor,
    tensors: Sequence[Tensor],
    windows: Windows,
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of x, core, factor_out, factor_in and bias by differentiating the oracle."""
    with torch.enable_grad():
        if not create_graph:
            tensors = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=False)]
        x, core, factor_out, factor_in = tensors
        y = reference.tucker2_conv2d(x, core, factor_out, factor_in, None, *windows)
        sources = [t for t, w in zip(tensors, wanted, strict=False) if w]
        found = iter(torch.autograd.grad(y, sources, grad, create_graph=create_graph) if sources else ())
    gradients: list[Tensor | None] = [next(found) if w else None for w in wanted[:4]]
    gradients.append(grad.sum((0, 2, 3)) if wanted[4] else None)
    return gradients
