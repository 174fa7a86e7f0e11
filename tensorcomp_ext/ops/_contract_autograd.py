"""Gradients of a contraction of cores: the backward op, or the oracle where they are differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._contract_program import decode
from ._oracle_gradients import oracle_gradients
from ._register import define
from ._transforms import transformed

SCHEMAS = {
    "contract": "(Tensor[] cores, int[] program) -> (Tensor, Tensor)",
    "contract_backward": "(Tensor grad, Tensor[] cores, Tensor saved, int[] program, int output_mask) "
    "-> Tensor[]",
}

for _op, _schema in SCHEMAS.items():
    define(_op, _schema)

_forward = torch.ops.tensorcomp.contract.default
_backward = torch.ops.tensorcomp.contract_backward.default
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd
_is_legacy_mapped = torch._C._functorch.is_legacy_batchedtensor
_unwrap = torch._C._functorch.unwrap_if_dead


def oracle(cores: Sequence[Tensor], program: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The reference for a program as the ops take it: the result, and the other products side by side."""
    *between, result = reference.contract(cores, *decode(program))
    saved = torch.cat([product.reshape(-1) for product in between]) if between else result.new_empty(0)
    return result, saved


def gradients(
    grad: Tensor,
    cores: Sequence[Tensor],
    program: Sequence[int],
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of every core by differentiating the oracle; ``grad`` may be folded otherwise."""

    def forward(*cores: Tensor) -> Tensor:
        return reference.contract(cores, *decode(program))[-1].reshape(grad.shape)

    found = oracle_gradients(forward, grad, cores, (*wanted, False), create_graph, bias_dims=())
    return found[:-1]


class Contract(torch.autograd.Function):
    """The op's autograd; called directly it spares a call the dispatcher's way into Python."""

    @staticmethod
    def forward(ctx: Any, program: Sequence[int], shape: Sequence[int] | None, *cores: Tensor) -> Any:
        with _below_autograd():
            result, saved = _forward(cores, program)
            if shape is not None:
                # A plain view made here could not be written to in place.
                result = _unsafe_view(result, shape)
        ctx.save_for_backward(saved, *cores)
        ctx.set_materialize_grads(False)
        ctx.program = program
        if shape is not None:
            return result
        ctx.mark_non_differentiable(saved)
        return result, saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, *cores = ctx.saved_tensors
        if grad is None:
            return None, None, *(None for _ in cores)
        wanted = ctx.needs_input_grad[2:]
        mapped = transformed() or _is_legacy_mapped(grad)  # lists of tensors have no fallback in a vmap
        if (_is_grad_enabled() or mapped) and not _is_compiling():
            # Somebody differentiates or maps the gradients: the oracle is made of torch operations.
            return None, None, *gradients(grad, cores, ctx.program, wanted, _is_grad_enabled())
        if False not in wanted:
            return None, None, *_backward(grad, cores, saved, ctx.program, -1)
        mask = sum(w << bit for bit, w in enumerate(wanted))
        found = _backward(grad, cores, saved, ctx.program, mask)
        return None, None, *[g if w else None for g, w in zip(found, wanted, strict=True)]


_unsafe_view = torch.ops.aten._unsafe_view.default

# See _conv_autograd.py on what this leaves out.
_apply = super(torch.autograd.Function, Contract).apply


def _wants_gradients(cores: Sequence[Tensor]) -> bool:
    if _is_grad_enabled():
        for core in cores:
            if core.requires_grad:
                return True
    return False


def native_contract(cores: Sequence[Tensor], program: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The op's result folded to ``shape``, differentiable where gradients are wanted.

    The cores fit and no transform is on. Folding it here spares autograd a view.
    """
    if _wants_gradients(cores):
        made: Tensor = _apply(program, shape, *map(_unwrap, cores))
        return made
    with _below_autograd():
        result: Tensor = _forward(cores, program)[0]
        return result.view(shape)


def autograd_kernel(cores: Sequence[Tensor], program: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the dispatcher calls for ``torch.ops.tensorcomp.contract`` where autograd looks on."""
    if transformed():
        return oracle(cores, program)
    if _wants_gradients(cores):
        made: tuple[Tensor, Tensor] = _apply(program, None, *map(_unwrap, cores))
        return made
    with _below_autograd():
        found: tuple[Tensor, Tensor] = _forward(cores, program)
        return found
