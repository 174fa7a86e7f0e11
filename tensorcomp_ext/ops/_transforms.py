"""Whether a call is seen by a function transform or by forward-mode differentiation."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_functorch_active = torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """True inside ``torch.func`` transforms (grad, vmap, jvp …) and inside a dual level.

    Native kernels know neither batched nor dual tensors: such calls belong to code of torch operations.
    """
    return _functorch_active() or forward_ad._current_level >= 0
