"""Whether a call is seen by a function transform or by forward-mode differentiation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch_active = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_tracked = torch._C._functorch.is_gradtrackingtensor
_unwrapped = torch._C._functorch.get_unwrapped
_modes_on = torch._C._len_torch_dispatch_stack


def transformed() -> bool:
    """True inside ``torch.func`` transforms (grad, vmap, jvp …) and inside a dual level.

    Native kernels know neither batched nor dual tensors: such calls belong to code of torch operations.
    """
    return _functorch_active() or forward_ad._current_level >= 0


def with_numbers(tensor: Tensor) -> Tensor | None:
    """The tensor where its entries can be looked at: not mapped, not traced, not on meta.

    Without the wrappers that differentiating transforms put around every argument of an op.
    """
    while _is_tracked(tensor):
        tensor = _unwrapped(tensor)
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
    return tensor if plain and not _is_wrapped(tensor) and _modes_on() == 0 else None
