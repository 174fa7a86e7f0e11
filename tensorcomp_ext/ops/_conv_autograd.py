"""Gradients of bottleneck convolutions: the backward op, or the oracle where they are differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._conv_arguments import IntOrPair
from ._cuda import convolution_tf32
from ._oracle_gradients import oracle_gradients
from ._transforms import transformed

Windows = tuple[IntOrPair, IntOrPair, IntOrPair]
"""Stride, padding and dilation in any spelling the op takes."""

Options = tuple[Any, ...]
"""What follows the windows in the op's schema, from the front; the schema's defaults stand for the rest."""

_EVERY_GRADIENT = 31
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd
_unwrap = torch._C._functorch.unwrap_if_dead


class ConvAutograd(NamedTuple):
    """The ways to call one op with its autograd; made by :func:`conv_autograd`."""

    differentiable: Callable[..., Tensor]
    """``(x, core, factor_out, factor_in, bias, windows, options=None)``: the arguments fit, no transform is
    on and gradients are wanted. Options None: a full core, TF32 as torch allows it."""

    native: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Windows, Options], Tensor]
    """The op, differentiable where gradients are wanted; the arguments fit and no transform is on."""

    kernel: Callable[..., Tensor]
    """What the dispatcher calls for the op where autograd looks on."""

    gradients: Callable[..., list[Tensor | None]]
    """``(grad, tensors, windows, options, wanted, create_graph)``: by differentiating the oracle."""


def conv_autograd(name: str, oracle: Callable[..., Tensor], plain: Options = ()) -> ConvAutograd:
    """Autograd of ``tensorcomp::name``, whose backward op is ``tensorcomp::name_backward``.

    Args:
        oracle: takes the tensors, the bias, the windows and as many options as ``plain`` has.
        plain: the options in front of ``allow_tf32`` that mean a convolution with a full core.
    """
    op: Any = getattr(torch.ops.tensorcomp, name).default
    backward_op: Any = getattr(torch.ops.tensorcomp, f"{name}_backward").default
    forms = len(plain)

    def gradients(
        grad: Tensor,
        tensors: Sequence[Tensor],
        windows: Windows,
        options: Options,
        wanted: Sequence[bool],
        create_graph: bool,
    ) -> list[Tensor | None]:
        def forward(*tensors: Tensor) -> Tensor:
            return oracle(*tensors, None, *windows, *options[:forms])

        return oracle_gradients(forward, grad, tensors, wanted, create_graph, bias_dims=(0, 2, 3))

    class Conv(torch.autograd.Function):
        """The op's autograd; called directly it spares a call the dispatcher's way into Python."""

        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            core: Tensor,
            factor_out: Tensor,
            factor_in: Tensor,
            bias: Tensor | None,
            windows: Windows,
            options: Options,
        ) -> Tensor:
            ctx.save_for_backward(x, core, factor_out, factor_in)
            ctx.windows, ctx.options = windows, options
            with _below_autograd():
                y: Tensor = op(x, core, factor_out, factor_in, bias, *windows, *options)
                return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            x, core, factor_out, factor_in = ctx.saved_tensors
            wanted, windows, options = ctx.needs_input_grad, ctx.windows, ctx.options
            if (_is_grad_enabled() or transformed()) and not _is_compiling():
                # Somebody differentiates or maps the gradients: the oracle is made of torch operations.
                tensors = (x, core, factor_out, factor_in)
                return *gradients(grad, tensors, windows, options, wanted, _is_grad_enabled()), None, None
            mask = wanted[0] | wanted[1] << 1 | wanted[2] << 2 | wanted[3] << 3 | wanted[4] << 4
            found = backward_op(grad, x, core, factor_out, factor_in, *windows, mask, *options)
            if mask == _EVERY_GRADIENT:
                return *found, None, None
            return *[g if w else None for g, w in zip(found, wanted, strict=False)], None, None

    Conv.__name__ = Conv.__qualname__ = "".join(word.capitalize() for word in name.split("_"))
    # Function.apply puts two microseconds around this. Where no transform is on, all that matters of it is
    # what it does for tensors that have outlived one.
    apply = super(torch.autograd.Function, Conv).apply

    def differentiable(
        x: Tensor,
        core: Tensor,
        factor_out: Tensor,
        factor_in: Tensor,
        bias: Tensor | None,
        windows: Windows,
        options: Options | None = None,
    ) -> Tensor:
        if options is None:
            options = () if x.is_cpu else (*plain, convolution_tf32(x))
        if bias is not None:
            bias = _unwrap(bias)
        y: Tensor = apply(
            _unwrap(x), _unwrap(core), _unwrap(factor_out), _unwrap(factor_in), bias, windows, options
        )
        return y

    def native(
        x: Tensor,
        core: Tensor,
        factor_out: Tensor,
        factor_in: Tensor,
        bias: Tensor | None,
        windows: Windows,
        options: Options,
    ) -> Tensor:
        if _is_grad_enabled() and (
            x.requires_grad
            or core.requires_grad
            or factor_out.requires_grad
            or factor_in.requires_grad
            or (bias is not None and bias.requires_grad)
        ):
            return differentiable(x, core, factor_out, factor_in, bias, windows, options)
        with _below_autograd():
            y: Tensor = op(x, core, factor_out, factor_in, bias, *windows, *options)
            return y

    def kernel(
        x: Tensor,
        core: Tensor,
        factor_out: Tensor,
        factor_in: Tensor,
        bias: Tensor | None = None,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        *options: Any,
    ) -> Tensor:
        windows = (stride, padding, dilation)
        if transformed():
            return oracle(x, core, factor_out, factor_in, bias, *windows, *options[:forms])
        return native(x, core, factor_out, factor_in, bias, windows, options)

    return ConvAutograd(differentiable, native, kernel, gradients)
