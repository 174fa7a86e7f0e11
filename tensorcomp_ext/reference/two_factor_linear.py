"""Oracle of the linear layer with a two-factor weight."""

from __future__ import annotations

import torch
from torch import Tensor


def two_factor_linear(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer with the weight ``a b``, factor by factor.

    ``y = (x bᵀ) aᵀ + bias``

    Args:
        x: input ``[..., in]``.
        a: ``[out, R]``.
        b: ``[R, in]``.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]``.

    Cost: ``R (in + out)`` MACs a row.

    Source: Eckart, Young 1936 (the best such weight).
    """
    z = torch.einsum("...i,ri->...r", x, b)  # [..., R]
    y = torch.einsum("...r,or->...o", z, a)  # [..., out]
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias.to(y.dtype)
