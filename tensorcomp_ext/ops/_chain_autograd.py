"""Gradients of a chain of products: the backward op, or the oracle where they are differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._chain_program import decode
from ._cuda import matmul_tf32
from ._oracle_gradients import oracle_gradients
from ._register import define
from ._transforms import transformed

SCHEMAS = {
    "chain": "(Tensor x, Tensor[] matrices, Tensor? bias, int[] program, bool allow_tf32=False) -> Tensor",
    "chain_backward": "(Tensor grad, Tensor x, Tensor[] matrices, int[] program, int output_mask, "
    "bool allow_tf32=False) -> Tensor[]",
}

for _op, _schema in SCHEMAS.items():
    define(_op, _schema)

_OPS = torch.ops.tensorcomp
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd
_is_legacy_mapped = torch._C._functorch.is_legacy_batchedtensor
_unwrap = torch._C._functorch.unwrap_if_dead


def oracle(x: Tensor, matrices: Sequence[Tensor], bias: Tensor | None, program: Sequence[int]) -> Tensor:
    """The reference for a program as the ops take it."""
    return reference.chain(x, matrices, bias, *decode(program))


class Chain(torch.autograd.Function):
    """The op's autograd; called directly it spares a call the dispatcher's way into Python."""

    @staticmethod
    def forward(
        ctx: Any, program: Sequence[int], allow_tf32: bool, x: Tensor, bias: Tensor | None, *matrices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *matrices)
        ctx.program, ctx.allow_tf32 = program, allow_tf32
        with _below_autograd():
            y: Tensor = _OPS.chain.default(x, matrices, bias, program, allow_tf32)
            return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *matrices = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        mapped = transformed() or _is_legacy_mapped(grad)  # lists of tensors have no fallback in a vmap
        if (_is_grad_enabled() or mapped) and not _is_compiling():
            # Somebody differentiates or maps the gradients: the oracle is made of torch operations.
            return None, None, *gradients(grad, x, matrices, ctx.program, wanted, _is_grad_enabled())
        mask = sum(w << bit for bit, w in enumerate(wanted))
        found = _OPS.chain_backward.default(grad, x, matrices, ctx.program, mask, ctx.allow_tf32)
        return None, None, *[g if w else None for g, w in zip(found, wanted, strict=True)]


# See _conv_autograd.py on what this leaves out.
_apply = super(torch.autograd.Function, Chain).apply


def differentiable_chain(
    x: Tensor,
    matrices: Sequence[Tensor],
    bias: Tensor | None,
    program: Sequence[int],
    allow_tf32: bool | None = None,
) -> Tensor:
    """The op with its autograd; the arguments fit, no transform is on and gradients are wanted.

    ``allow_tf32`` None: as torch allows it.
    """
    if allow_tf32 is None:
        allow_tf32 = matmul_tf32(x)
    if bias is not None:
        bias = _unwrap(bias)
    y: Tensor = _apply(program, allow_tf32, _unwrap(x), bias, *map(_unwrap, matrices))
    return y


def native_chain(
    x: Tensor, matrices: Sequence[Tensor], bias: Tensor | None, program: Sequence[int], allow_tf32: bool
) -> Tensor:
    """The op, differentiable where gradients are wanted; the arguments fit and no transform is on."""
    if _is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or any(matrix.requires_grad for matrix in matrices)
    ):
        return differentiable_chain(x, matrices, bias, program, allow_tf32)
    with _below_autograd():
        y: Tensor = _OPS.chain.default(x, matrices, bias, program, allow_tf32)
        return y


def autograd_kernel(
    x: Tensor,
    matrices: Sequence[Tensor],
    bias: Tensor | None,
    program: Sequence[int],
    allow_tf32: bool = False,
) -> Tensor:
    """What the dispatcher calls for ``torch.ops.tensorcomp.chain`` where autograd looks on."""
    if transformed():
        return oracle(x, matrices, bias, program)
    return native_chain(x, matrices, bias, program, allow_tf32)


def gradients(
    grad: Tensor,
    x: Tensor,
    matrices: Sequence[Tensor],
    program: Sequence[int],
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of x, the bias and every matrix by differentiating the oracle."""

    def forward(x: Tensor, *matrices: Tensor) -> Tensor:
        return oracle(x, matrices, None, program)

    of_x, of_bias, *of_matrices = wanted
    found = oracle_gradients(
        forward,
        grad,
        (x, *matrices),
        (of_x, *of_matrices, of_bias),
        create_graph,
        bias_dims=range(grad.dim() - 1),
    )
    return [found[0], found[-1], *found[1:-1]]
