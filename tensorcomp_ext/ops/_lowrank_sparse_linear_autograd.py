"""Gradients of the low-rank + sparse linear layer: the backward op, or the oracle for their own gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._oracle_gradients import oracle_gradients
from ._register import define
from ._transforms import transformed
from .lowrank_sparse_packing import PackedSparse, check_numbers

SCHEMAS = {
    "lowrank_sparse_linear": "(Tensor x, Tensor a, Tensor b, Tensor values, Tensor? bias, Tensor offsets, "
    "Tensor positions) -> Tensor",
    "lowrank_sparse_linear_backward": "(Tensor grad, Tensor x, Tensor a, Tensor b, Tensor values, "
    "Tensor offsets, Tensor positions, int output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
"""Bits of ``output_mask`` ask for the gradients of x, a, b, values and the bias; others come empty."""

for _op, _schema in SCHEMAS.items():
    define(_op, _schema)

_OPS = torch.ops.tensorcomp
_EVERY_GRADIENT = 31
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd
_unwrap = torch._C._functorch.unwrap_if_dead


def oracle(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    positions: Tensor,
) -> Tensor:
    """The reference, its arguments in the op's order."""
    return reference.lowrank_sparse_linear(x, a, b, values, offsets, positions, bias)


class LowrankSparseLinear(torch.autograd.Function):
    """The op's autograd; called directly it spares a call the dispatcher's way into Python."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        values: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        positions: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, values, offsets, positions)
        with _below_autograd():
            y: Tensor = _OPS.lowrank_sparse_linear.default(x, a, b, values, bias, offsets, positions)
            return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, values, offsets, positions = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        if (_is_grad_enabled() or transformed()) and not _is_compiling():
            # Somebody differentiates or maps the gradients: the oracle is made of torch operations.
            made = gradients(grad, (x, a, b, values), offsets, positions, wanted, _is_grad_enabled())
            return *made, None, None
        mask = sum(w << bit for bit, w in enumerate(wanted))
        found = _OPS.lowrank_sparse_linear_backward.default(grad, x, a, b, values, offsets, positions, mask)
        if mask == _EVERY_GRADIENT:
            return *found, None, None
        return *[g if w else None for g, w in zip(found, wanted, strict=True)], None, None


# See _conv_autograd.py on what this leaves out.
_apply = super(torch.autograd.Function, LowrankSparseLinear).apply


def native_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    positions: Tensor,
) -> Tensor:
    """The op, differentiable where gradients are wanted; the arguments fit and no transform is on."""
    if _is_grad_enabled() and (
        x.requires_grad
        or a.requires_grad
        or b.requires_grad
        or values.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        if bias is not None:
            bias = _unwrap(bias)
        y: Tensor = _apply(_unwrap(x), _unwrap(a), _unwrap(b), _unwrap(values), bias, offsets, positions)
        return y
    with _below_autograd():
        y = _OPS.lowrank_sparse_linear.default(x, a, b, values, bias, offsets, positions)
        return y


def autograd_kernel(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    positions: Tensor,
) -> Tensor:
    """What the dispatcher calls for ``tensorcomp::lowrank_sparse_linear`` where autograd looks on."""
    if transformed():
        packed = PackedSparse(values.contiguous(), offsets.contiguous(), positions.contiguous(), b.shape[1])
        check_numbers(packed, "lowrank_sparse_linear")
        return oracle(x, a, b, values, bias, offsets, positions)
    return native_linear(x, a, b, values, bias, offsets, positions)


def gradients(
    grad: Tensor,
    tensors: Sequence[Tensor],
    offsets: Tensor,
    positions: Tensor,
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of x, a, b, values and bias by differentiating the oracle."""

    def forward(x: Tensor, a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        return oracle(x, a, b, values, None, offsets, positions)

    rows = range(grad.dim() - 1)
    return oracle_gradients(forward, grad, tensors, wanted, create_graph, rows)
