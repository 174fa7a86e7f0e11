"""The tensors of a row of the chain suite, and the float64 answer every candidate is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import DTYPES
from .chain_cases import ChainCase
from .problem import distance, exceeded, step


class ChainProblem:
    """Rows, cores, bias and output gradient of one case, values of unit scale; the dense weight on demand."""

    def __init__(self, case: ChainCase, *, training: bool, device: str = "cpu", seed: int = 0) -> None:
        dtype = DTYPES[case.dtype or "float32"]
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            return (drawn * scale).to(dtype)

        self.case, self.training, self.device = case, training, device
        self.x_values = draw(case.rows, case.c_in)
        spec = case.cores
        scale = core_scale(spec.shapes, spec.sizes, spec.outputs + spec.inputs, case.c_in)
        self.cores = [draw(*shape, scale=scale) for shape in spec.shapes]
        self.bias = draw(case.c_out, scale=0.1)
        self.grad = draw(case.rows, case.c_out)
        self.names = ("y", "grad x", *(f"grad core {k}" for k in range(len(self.cores))), "grad bias")
        self.expected = self._answer()

    def x(self) -> Tensor:
        return self.x_values.detach().clone().requires_grad_(self.training)

    def weights(self) -> list[Tensor]:
        """Fresh copies of the cores, then of the bias; leaves."""
        return [w.clone().requires_grad_(self.training) for w in (*self.cores, self.bias)]

    def dense_weight(self) -> Tensor:
        """``[c_out, c_in]``, multiplied in float64 and rounded once."""
        return self._dense([core.double() for core in self.cores]).to(self.bias.dtype)

    def fault(self, outputs: Sequence[Tensor], slack: float = 1.0) -> str | None:
        """What is wrong with a candidate's outputs, or None; they come in the order of ``names``."""
        errors = {
            name: distance(got, want)
            for name, got, want in zip(self.names, outputs, self.expected, strict=False)
        }
        return exceeded(errors, self.case.dtype or "float32", slack)

    def call(self, forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> Any:
        """A call on the input: the output alone, or a training step with the gradients of ``parameters``."""
        x = self.x()
        if not self.training:
            return lambda: (forward(x),)
        return step(lambda: forward(x), [x, *parameters], self.grad)

    def _dense(self, cores: Sequence[Tensor]) -> Tensor:
        case = self.case
        return torch.einsum(case.cores.equation(), *cores).reshape(case.c_out, case.c_in)

    def _answer(self) -> list[Tensor]:
        kept = (self.x_values, *self.cores, self.bias)
        tensors = [t.double().requires_grad_(self.training) for t in kept]
        x, *cores, bias = tensors
        y = torch.nn.functional.linear(x, self._dense(cores), bias)
        if not self.training:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, tensors, self.grad.double())]


def core_scale(
    shapes: Sequence[Sequence[int]], sizes: dict[int, int], kept: Sequence[int], fan_in: int
) -> float:
    """Standard deviation of every core's entries that gives the weight entries of variance 1 / fan_in:
    ``(1 / (fan_in prod ranks))^(1 / 2N)``, the product over the labels summed."""
    summed = math.prod(size for label, size in sizes.items() if label not in kept)
    return (fan_in * summed) ** (-0.5 / len(shapes))
