"""Gradients by differentiating an oracle, where a backward op's own results are not enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ForceDispatchKeyGuard

_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_AUTOGRAD_KEYS = (
    DispatchKeySet(DispatchKey.AutogradFunctionality)
    | DispatchKeySet(DispatchKey.AutogradOther)
    | DispatchKeySet(DispatchKey.AutogradNestedTensor)
)


def mask_bits(output_mask: int, count: int) -> list[bool]:
    """Which of a backward op's ``count`` gradients are wanted, the lowest bit first."""
    return [bool(output_mask >> bit & 1) for bit in range(count)]


def oracle_gradients(
    oracle: Callable[..., Tensor],
    grad: Tensor,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    create_graph: bool,
    bias_dims: Sequence[int],
) -> list[Tensor | None]:
    """Gradients of ``tensors`` and, behind them, of a bias added to ``oracle(*tensors)``.

    Args:
        wanted: which gradients to find, the bias's last; the others are None.
        create_graph: whether the gradients can be differentiated.
        bias_dims: the dimensions of ``grad`` along which the bias was repeated.
    """
    count = len(tensors)
    with torch.enable_grad():
        if create_graph:
            # At its own place: a tensor that is given twice, or depends on another one, has one there, too.
            places = [t.view_as(t) for t in tensors]
            found = _derivatives(oracle, grad, places, wanted, create_graph=True)
        else:
            # The op's own kernel is called below autograd; what is differentiated here must be above it.
            with _ForceDispatchKeyGuard(_included(), _excluded() - _AUTOGRAD_KEYS):
                leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=False)]
                found = _derivatives(oracle, grad, leaves, wanted, create_graph=False)
    derivatives = iter(found)
    gradients: list[Tensor | None] = [next(derivatives) if w else None for w in wanted[:count]]
    # Without dimensions sum() would add up everything; an op must not return its input.
    dims = list(bias_dims)
    gradients.append(None if not wanted[count] else grad.sum(dims) if dims else grad.clone())
    return gradients


def _derivatives(
    oracle: Callable[..., Tensor],
    grad: Tensor,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    create_graph: bool,
) -> Sequence[Tensor]:
    sources = [t for t, w in zip(tensors, wanted, strict=False) if w]
    if not sources:
        return ()
    return torch.autograd.grad(oracle(*tensors), sources, grad, create_graph=create_graph)
