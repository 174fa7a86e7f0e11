"""The autograd of the Tucker-2 convolution."""

from __future__ import annotations

from .. import reference
from ._conv_autograd import conv_autograd
from ._register import define

SCHEMAS = {
    "tucker2_conv2d": "(Tensor x, Tensor core, Tensor factor_out, Tensor factor_in, Tensor? bias=None, "
    "int[2] stride=1, int[2] padding=0, int[2] dilation=1, bool allow_tf32=False) -> Tensor",
    "tucker2_conv2d_backward": "(Tensor grad, Tensor x, Tensor core, Tensor factor_out, Tensor factor_in, "
    "int[2] stride, int[2] padding, int[2] dilation, int output_mask, bool allow_tf32=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}

for _op, _schema in SCHEMAS.items():
    define(_op, _schema)

AUTOGRAD = conv_autograd("tucker2_conv2d", reference.tucker2_conv2d)
differentiable_conv2d = AUTOGRAD.differentiable
native_conv2d = AUTOGRAD.native
