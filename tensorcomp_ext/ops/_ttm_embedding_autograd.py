"""Gradients of the TTM embedding: the backward op, or the oracle where they are differentiated."""

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
    "ttm_embedding": "(Tensor indices, Tensor[] cores, int num_embeddings, int padding_idx=-1) -> Tensor",
    "ttm_embedding_backward": "(Tensor grad, Tensor indices, Tensor[] cores, int num_embeddings, "
    "int padding_idx, int output_mask) -> Tensor[]",
}
"""``padding_idx`` -1 is none; bit k of ``output_mask`` asks for the gradient of core k, others come empty."""

for _op, _schema in SCHEMAS.items():
    define(_op, _schema)

_OPS = torch.ops.tensorcomp
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd
_unwrap = torch._C._functorch.unwrap_if_dead


def oracle(indices: Tensor, cores: Sequence[Tensor], num_embeddings: int, padding_idx: int = -1) -> Tensor:
    """The reference in the dtype of the cores: autocast leaves embeddings alone."""
    device = indices.device.type
    padding = None if padding_idx < 0 else padding_idx
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return reference.ttm_embedding(indices, cores, num_embeddings, padding)
    return reference.ttm_embedding(indices, cores, num_embeddings, padding)


class TTMEmbedding(torch.autograd.Function):
    """The op's autograd; called directly it spares a call the dispatcher's way into Python."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, num_embeddings: int, padding_idx: int, *cores: Tensor) -> Tensor:
        ctx.save_for_backward(indices, *cores)
        ctx.sizes = num_embeddings, padding_idx
        with _below_autograd():
            y: Tensor = _OPS.ttm_embedding.default(indices, cores, num_embeddings, padding_idx)
            return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, *cores = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        if (_is_grad_enabled() or transformed()) and not _is_compiling():
            # Somebody differentiates or maps the gradients: the oracle is made of torch operations.
            rows, padding = ctx.sizes
            found = gradients(grad, indices, cores, rows, padding, wanted, _is_grad_enabled())
            return None, None, None, *found
        mask = sum(w << k for k, w in enumerate(wanted))
        ours = _OPS.ttm_embedding_backward.default(grad, indices, cores, *ctx.sizes, mask)
        return None, None, None, *(g if w else None for g, w in zip(ours, wanted, strict=True))


# See _conv_autograd.py on what this leaves out.
_apply = super(torch.autograd.Function, TTMEmbedding).apply


def differentiable_ttm_embedding(
    indices: Tensor, cores: Sequence[Tensor], num_embeddings: int, padding_idx: int = -1
) -> Tensor:
    """The op with its autograd; the arguments fit, no transform is on and gradients are wanted."""
    y: Tensor = _apply(_unwrap(indices), num_embeddings, padding_idx, *map(_unwrap, cores))
    return y


def native_ttm_embedding(
    indices: Tensor, cores: Sequence[Tensor], num_embeddings: int, padding_idx: int = -1
) -> Tensor:
    """The op, differentiable where gradients are wanted; the arguments fit and no transform is on."""
    if _is_grad_enabled() and any(core.requires_grad for core in cores):
        return differentiable_ttm_embedding(indices, cores, num_embeddings, padding_idx)
    with _below_autograd():
        y: Tensor = _OPS.ttm_embedding.default(indices, cores, num_embeddings, padding_idx)
        return y


def autograd_kernel(
    indices: Tensor, cores: Sequence[Tensor], num_embeddings: int, padding_idx: int = -1
) -> Tensor:
    """What the dispatcher calls for ``torch.ops.tensorcomp.ttm_embedding`` where autograd looks on."""
    if transformed():
        return oracle(indices, cores, num_embeddings, padding_idx)
    return native_ttm_embedding(indices, cores, num_embeddings, padding_idx)


def gradients(
    grad: Tensor,
    indices: Tensor,
    cores: Sequence[Tensor],
    num_embeddings: int,
    padding_idx: int,
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of the cores by differentiating the oracle."""

    def forward(*cores: Tensor) -> Tensor:
        return oracle(indices, cores, num_embeddings, padding_idx)

    # No bias stands behind the cores.
    return oracle_gradients(forward, grad, cores, (*wanted, False), create_graph, ())[:-1]
