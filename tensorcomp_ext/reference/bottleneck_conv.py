"""Oracle of the bottleneck convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def bottleneck_conv2d(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    ring: int = 1,
    depthwise: bool = False,
) -> Tensor:
    """Pointwise convolution into rank space, spatial core, pointwise convolution out of it.

    ``y[n,t] = bias[t] + sum_qb factor_out[t,qB+b] * conv2d(u[n,q], core)[b]`` with
    ``u[n,q,a] = sum_s factor_in[s,qA+a] x[n,s]``, ``q < ring``.

    Args:
        x: input ``[N, S, H, W]``.
        core: ``[B, A, kH, kW]``, the same for every ring index; depthwise ``[R, 1, kH, kW]``.
        factor_out: ``[T, ring B]``; depthwise ``[T, R]``.
        factor_in: ``[S, ring A]``; depthwise ``[S, R]``.
        bias: ``[T]`` or None.
        stride, dilation: int or pair.
        padding: int, pair (rows, columns), four ints (top, bottom, left, right), "same" or "valid".
        ring: number of ring indices; 1 makes the Tucker-2 convolution.
        depthwise: ``core[r, 0]`` convolves rank r by itself; ring is 1 then.

    Returns:
        ``[N, T, H', W']``.

    Cost: ``N (H W S ring A + H' W' ring B (kH kW A + T))`` MACs; depthwise
    ``N R (H W S + H' W' (kH kW + T))``.

    Source: Kim et al. 2016 (Tucker-2), Lebedev et al. 2015 (CP), Wang et al. 2018 (tensor ring).
    """
    if not isinstance(padding, (str, int)) and len(padding) == 4:
        top, bottom, left, right = padding
        x = F.pad(x, (left, right, top, bottom))
        padding = 0
    u = torch.einsum("nshw,sa->nahw", x, factor_in)  # [N, ring A, H, W]
    # The ring indices share the core: they are images of a larger batch.
    u = u.unflatten(1, (ring, -1)).flatten(0, 1)  # [N ring, A, H, W]
    groups = core.shape[0] if depthwise else 1
    v = F.conv2d(u, core, stride=stride, padding=padding, dilation=dilation, groups=groups)
    v = v.unflatten(0, (-1, ring)).flatten(1, 2)  # [N, ring B, H', W']
    y = torch.einsum("nbhw,tb->nthw", v, factor_out)  # [N, T, H', W']
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias[:, None, None].to(y.dtype)
