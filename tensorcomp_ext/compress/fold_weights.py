"""Batch normalization in evaluation mode as a factor and an addend for each output; formats that take it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tensorcomp_ext.formats import SVD, BottleneckConv, Format, Tucker2, TwoFactor

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def tolerance(dtype: torch.dtype) -> float:
    """Relative L2 difference that another order of roundings explains."""
    return _TOLERANCES.get(dtype, 1e-4)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative L2 difference, infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.detach().double()
    return float((found.detach().double() - wide).norm() / wide.norm().clamp_min(1e-30))


def affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64, of a batch normalization with running statistics: ``y = scale x + shift``."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def folded_bias(bias: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """The bias of a layer that a batch normalization followed."""
    total = shift if bias is None else bias.detach().double() * scale + shift
    return nn.Parameter(total.to(dtype), requires_grad=False)


def scaled(weight: Format, scale: Tensor) -> Format | None:
    """A format whose dense weight is that of ``weight`` with output t multiplied by ``scale[t]``.

    None where the outputs are spread over several cores, none of which can take a factor for each.
    """
    form = weight.lower()
    if isinstance(form, TwoFactor):
        return SVD(_times(form.a, scale), form.b.detach().clone())
    if isinstance(form, BottleneckConv) and form.ring == 1 and not form.depthwise:
        return Tucker2(
            form.core.detach().clone(), _times(form.point_out, scale), form.point_in.detach().clone()
        )
    return None


def _times(matrix: Tensor, scale: Tensor) -> Tensor:
    """Every row of ``matrix`` times its factor, rounded once."""
    return (matrix.detach().double() * scale[:, None]).to(matrix.dtype)
