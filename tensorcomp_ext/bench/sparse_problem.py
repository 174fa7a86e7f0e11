"""The tensors of a row of the low-rank + sparse suite, and the float64 answer every candidate is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import DTYPES
from .problem import distance, exceeded, step
from .sparse_cases import SparseCase


class SparseProblem:
    """Factors, sparse part and mask of a weight with entries of unit variance; rows and bias, or none."""

    def __init__(self, case: SparseCase, *, training: bool, device: str = "cpu", seed: int = 0) -> None:
        dtype = DTYPES[case.dtype or "float32"]
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            return (drawn * scale).to(dtype)

        m, n, r = case.c_out, case.c_in, case.rank
        self.case, self.training, self.device = case, training, device
        self.a, self.b, self.values = draw(m, r, scale=r**-0.5), draw(r, n), draw(m, n)
        if case.spread:
            scale = (case.spread * torch.randn(m, 1, generator=generator, device=device)).exp()
            scores = torch.randn(m, n, generator=generator, device=device).abs() * scale
            kept = scores.flatten().topk(case.nnz).indices
        else:
            kept = torch.randperm(m * n, generator=generator, device=device)[: case.nnz]
        self.mask = torch.zeros(m * n, dtype=torch.bool, device=device)
        self.mask[kept] = True
        self.mask = self.mask.reshape(m, n)
        rows = m if case.rows is None else case.rows
        self._x = None if case.rows is None else draw(rows, n, scale=n**-0.5)
        self.bias = None if case.rows is None else draw(m, scale=0.1)
        self.grad = draw(rows, n if case.rows is None else m)
        self.names = ("y", *(f"grad {name}" for name in ("a", "b", "values")))
        if case.rows is not None:
            self.names = (*self.names, "grad bias", "grad x")
        self.expected = self._answer()

    def x(self) -> Tensor:
        """The input, a leaf that requires its gradient in training."""
        assert self._x is not None
        return self._x.clone().requires_grad_(self.training)

    def weights(self) -> list[Tensor]:
        """Fresh copies of a, b, values, and the bias where there are rows; leaves."""
        held = (self.a, self.b, self.values, *(() if self.bias is None else (self.bias,)))
        return [w.clone().requires_grad_(self.training) for w in held]

    def dense_weight(self) -> Tensor:
        """W, in float64, rounded once."""
        return self.reconstruct(self.a.double(), self.b.double(), self.values.double()).to(self.a.dtype)

    def reconstruct(self, a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        """W by torch's operations."""
        if self.case.mode == "masking":
            return torch.where(self.mask, values, a @ b)
        return torch.where(self.mask, values, 0) + a @ b

    def additive_values(self) -> Tensor:
        """What the packed form adds to ``A B``: S, or ``S - A B`` in mode "masking"."""
        if self.case.mode == "additive":
            return self.values
        return (self.values.double() - self.a.double() @ self.b.double()).to(self.values.dtype)

    def fault(self, outputs: Sequence[Tensor], slack: float = 1.0) -> str | None:
        """What is wrong with a candidate's outputs, or None; they come in the order of ``names``."""
        errors = {
            name: distance(got, want)
            for name, got, want in zip(self.names, outputs, self.expected, strict=False)
        }
        return exceeded(errors, self.case.dtype or "float32", slack)

    def call(self, forward: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Any:
        """The output alone, or a training step with the gradients of ``wanted``."""
        return step(forward, wanted, self.grad) if self.training else lambda: (forward(),)

    def _answer(self) -> list[Tensor]:
        held = [w.detach().double().requires_grad_(self.training) for w in self.weights()]
        weight = self.reconstruct(*held[:3])
        if self._x is not None:
            x = self._x.double().requires_grad_(self.training)
            weight = F.linear(x, weight, held[3])
            held.append(x)
        if not self.training:
            return [weight]
        return [weight.detach(), *torch.autograd.grad(weight, held, self.grad.double())]
