"""Gradients of the two-factor linear layer: the backward op, or the oracle where they are differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._cuda import matmul_tf32
from ._oracle_gradients import oracle_gradients
from ._register import define
from ._transforms import transformed

SCHEMAS = {
    "two_factor_linear": "(Tensor x, Tensor a, Tensor b, Tensor? bias=None, bool allow_tf32=False) -> Tensor",
    "two_factor_linear_backward": "(Tensor grad, Tensor x, Tensor a, Tensor b, int output_mask, "
    "bool allow_tf32=False) -> (Tensor, Tensor, Tensor, Tensor)",
}

for _op, _schema in SCHEMAS.items():
    define(_op, _schema)

_OPS = torch.ops.tensorcomp
_EVERY_GRADIENT = 15
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd
_unwrap = torch._C._functorch.unwrap_if_dead


class TwoFactorLinear(torch.autograd.Function):
    """The op's autograd; called directly it spares a call the dispatcher's way into Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, allow_tf32: bool) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.allow_tf32 = allow_tf32
        with _below_autograd():
            y: Tensor = _OPS.two_factor_linear.default(x, a, b, bias, allow_tf32)
            return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if (_is_grad_enabled() or transformed()) and not _is_compiling():
            # Somebody differentiates or maps the gradients: the oracle is made of torch operations.
            return *gradients(grad, (x, a, b), wanted, _is_grad_enabled()), None
        mask = wanted[0] | wanted[1] << 1 | wanted[2] << 2 | wanted[3] << 3
        found = _OPS.two_factor_linear_backward.default(grad, x, a, b, mask, ctx.allow_tf32)
        if mask == _EVERY_GRADIENT:
            return *found, None
        return *[g if w else None for g, w in zip(found, wanted, strict=False)], None


# See _conv_autograd.py on what this leaves out.
_apply = super(torch.autograd.Function, TwoFactorLinear).apply


def differentiable_two_factor(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, allow_tf32: bool | None = None
) -> Tensor:
    """The op with its autograd; the arguments fit, no transform is on and gradients are wanted.

    ``allow_tf32`` None: as torch allows it.
    """
    if allow_tf32 is None:
        allow_tf32 = matmul_tf32(x)
    if bias is not None:
        bias = _unwrap(bias)
    y: Tensor = _apply(_unwrap(x), _unwrap(a), _unwrap(b), bias, allow_tf32)
    return y


def native_two_factor(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, allow_tf32: bool) -> Tensor:
    """The op, differentiable where gradients are wanted; the arguments fit and no transform is on."""
    if _is_grad_enabled() and (
        x.requires_grad or a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return differentiable_two_factor(x, a, b, bias, allow_tf32)
    with _below_autograd():
        y: Tensor = _OPS.two_factor_linear.default(x, a, b, bias, allow_tf32)
        return y


def autograd_kernel(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, allow_tf32: bool = False
) -> Tensor:
    """What the dispatcher calls for ``torch.ops.tensorcomp.two_factor_linear`` where autograd looks on."""
    if transformed():
        return reference.two_factor_linear(x, a, b, bias)
    return native_two_factor(x, a, b, bias, allow_tf32)


def gradients(
    grad: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool], create_graph: bool
) -> list[Tensor | None]:
    """Gradients of x, a, b and bias by differentiating the oracle."""
    rows = range(grad.dim() - 1)
    return oracle_gradients(reference.two_factor_linear, grad, tensors, wanted, create_graph, rows)
