"""The tensors of a row of the conv suite, and the float64 answer every candidate is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .cases import DTYPES, LAYOUTS
from .conv_cases import ConvCase
from .problem import distance, exceeded, step


class ConvProblem:
    """Input, factors, bias and output gradient of one case, values of unit scale; the dense weight on
    demand."""

    def __init__(self, case: ConvCase, *, training: bool, device: str = "cpu", seed: int = 0) -> None:
        if case.dtype is None or case.layout is None:
            raise ValueError("a case to be measured needs its dtype and layout")
        dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            return (drawn * scale).to(dtype)

        self.case, self.training, self.device = case, training, device
        self.layout = case.layout
        window = case.window
        self._x = draw(case.N, case.S, case.H, case.W)
        shapes = case.factor_shapes()
        summed = case.rank if case.format == "cp" else case.rank**3
        fan_in = case.S * math.prod(window.kernel)
        scale = (fan_in * summed) ** (-0.5 / len(shapes))
        self.factors = [draw(*shape, scale=scale) for shape in shapes]
        self.bias = draw(case.T, scale=0.1)
        self._grad = draw(case.N, case.T, *window.output_size)
        self.names = ("y", "grad x", *(f"grad factor {k}" for k in range(len(shapes))), "grad bias")
        self.expected = self._answer()

    def x(self, layout: str) -> Tensor:
        """The input in ``layout``, a leaf that requires its gradient in training."""
        x = self._x.detach().contiguous(memory_format=LAYOUTS[layout])
        return (x.clone() if x is self._x else x).requires_grad_(self.training)

    def weights(self) -> list[Tensor]:
        """Fresh copies of the factors and of the bias; leaves."""
        return [w.clone().requires_grad_(self.training) for w in (*self.factors, self.bias)]

    def multiply(self, factors: Sequence[Tensor]) -> Tensor:
        """The dense weight ``[T, S, kH, kW]`` of these factors."""
        if self.case.format == "cp":
            return torch.einsum("tr,sr,yr,xr->tsyx", *factors)
        return torch.einsum("qsa,adb,btq->tsd", *factors).unflatten(2, self.case.window.kernel)

    def dense_weight(self) -> Tensor:
        """Multiplied in float64 and rounded once."""
        return self.multiply([f.double() for f in self.factors]).to(self.bias.dtype).contiguous()

    def fault(self, outputs: Sequence[Tensor], slack: float = 1.0) -> str | None:
        """What is wrong with a candidate's outputs, or None; they come in the order of ``names``."""
        errors = {
            name: distance(got, want)
            for name, got, want in zip(self.names, outputs, self.expected, strict=False)
        }
        return exceeded(errors, self.case.dtype or "float32", slack)

    def call(self, layout: str, forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> Any:
        """A call on the input in ``layout``: the output alone, or a training step."""
        x = self.x(layout)
        if not self.training:
            return lambda: (forward(x),)
        grad = self._grad.contiguous(memory_format=LAYOUTS[layout])
        return step(lambda: forward(x), [x, *parameters], grad)

    def _answer(self) -> list[Tensor]:
        kept = (self._x, *self.factors, self.bias)
        tensors = [t.double().requires_grad_(self.training) for t in kept]
        x, *factors, bias = tensors
        window = self.case.window
        if self.case.format == "cp":
            y = reference.cp_conv2d(x, factors, bias, *window.geometry)
        else:
            first, core, last = factors
            kernel = window.kernel
            y = reference.tr_conv2d(x, first, core, last, bias, *window.geometry, kernel_size=kernel)
        if not self.training:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, tensors, self._grad.double())]
