"""Gradients of the low-rank + sparse weight: the backward op, or the oracle where they are differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._oracle_gradients import oracle_gradients
from ._register import define
from ._transforms import transformed

SCHEMAS = {
    "lowrank_sparse_weight": "(Tensor a, Tensor b, Tensor values, Tensor mask, bool masking, "
    "bool allow_tf32=False) -> Tensor",
    "lowrank_sparse_weight_backward": "(Tensor grad, Tensor a, Tensor b, Tensor mask, bool masking, "
    "int output_mask, bool allow_tf32=False) -> (Tensor, Tensor, Tensor)",
}
"""Bits 0, 1 and 2 of ``output_mask`` ask for the gradients of a, b and values; others come empty."""

for _op, _schema in SCHEMAS.items():
    define(_op, _schema)

_OPS = torch.ops.tensorcomp
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd
_unwrap = torch._C._functorch.unwrap_if_dead


def oracle(a: Tensor, b: Tensor, values: Tensor, mask: Tensor, masking: bool) -> Tensor:
    """The reference in the dtype of the factors: autocast leaves weights alone."""
    device = a.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return reference.lowrank_sparse_weight(a, b, values, mask, masking)
    return reference.lowrank_sparse_weight(a, b, values, mask, masking)


class LowrankSparseWeight(torch.autograd.Function):
    """The op's autograd; called directly it spares a call the dispatcher's way into Python."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, values: Tensor, mask: Tensor, masking: bool, allow_tf32: bool
    ) -> Tensor:
        ctx.save_for_backward(a, b, mask)
        ctx.options = masking, allow_tf32
        with _below_autograd():
            w: Tensor = _OPS.lowrank_sparse_weight.default(a, b, values, mask, masking, allow_tf32)
            return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, mask = ctx.saved_tensors
        masking, allow_tf32 = ctx.options
        wanted = ctx.needs_input_grad[:3]
        if (_is_grad_enabled() or transformed()) and not _is_compiling():
            # Somebody differentiates or maps the gradients: the oracle is made of torch operations.
            return *gradients(grad, a, b, mask, masking, wanted, _is_grad_enabled()), None, None, None
        bits = wanted[0] | wanted[1] << 1 | wanted[2] << 2
        found = _OPS.lowrank_sparse_weight_backward.default(grad, a, b, mask, masking, bits, allow_tf32)
        return *[g if w else None for g, w in zip(found, wanted, strict=True)], None, None, None


# See _conv_autograd.py on what this leaves out.
_apply = super(torch.autograd.Function, LowrankSparseWeight).apply


def native_weight(
    a: Tensor, b: Tensor, values: Tensor, mask: Tensor, masking: bool, allow_tf32: bool = False
) -> Tensor:
    """The op, differentiable where gradients are wanted; the arguments fit and no transform is on."""
    if _is_grad_enabled() and (a.requires_grad or b.requires_grad or values.requires_grad):
        w: Tensor = _apply(_unwrap(a), _unwrap(b), _unwrap(values), _unwrap(mask), masking, allow_tf32)
        return w
    with _below_autograd():
        w = _OPS.lowrank_sparse_weight.default(a, b, values, mask, masking, allow_tf32)
        return w


def autograd_kernel(
    a: Tensor, b: Tensor, values: Tensor, mask: Tensor, masking: bool, allow_tf32: bool = False
) -> Tensor:
    """What the dispatcher calls for ``tensorcomp::lowrank_sparse_weight`` where autograd looks on."""
    if transformed():
        return oracle(a, b, values, mask, masking)
    return native_weight(a, b, values, mask, masking, allow_tf32)


def gradients(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor,
    masking: bool,
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of a, b and values by differentiating the oracle, which is linear in the values."""

    def forward(a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        return oracle(a, b, values, mask, masking)

    values = torch.zeros_like(grad)
    if create_graph and wanted[2]:
        values.requires_grad_()
    return oracle_gradients(forward, grad, (a, b, values), (*wanted, False), create_graph, bias_dims=())[:3]
