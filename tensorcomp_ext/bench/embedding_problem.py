"""Indices and cores of a row of the embedding suite, and the float64 answer every candidate is held to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import DTYPES
from .chain_problem import core_scale
from .embedding_cases import EmbeddingCase
from .problem import distance, exceeded, step

_COMPARED = 2
_CACHE = 32 << 20
"""Bytes of the last cache of a usual machine."""
_MOST_SETS = 4096


class EmbeddingProblem:
    """Random indices, cores of a table with entries of unit variance, and the output's gradient."""

    def __init__(self, case: EmbeddingCase, *, training: bool, device: str = "cpu", seed: int = 0) -> None:
        dtype = DTYPES[case.dtype or "float32"]
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            return (drawn * scale).to(dtype)

        self.case, self.training, self.device = case, training, device
        self.indices = torch.randint(case.vocab, (case.rows,), generator=generator, device=device)
        spec = case.cores
        scale = core_scale(spec.shapes, spec.sizes, spec.outputs + spec.inputs, 1)
        self.cores = [draw(*shape, scale=scale) for shape in spec.shapes]
        self.grad = draw(case.rows, case.dim)
        self.names = ("y", *(f"grad core {k}" for k in range(len(self.cores))))
        self.expected = self._answer()

    def weights(self) -> list[Tensor]:
        """Fresh copies of the cores ``[r, vocab_k, dim_k, r']``; leaves."""
        return [w.clone().requires_grad_(self.training) for w in self.cores]

    def table(self) -> Tensor:
        """``[vocab, dim]``, multiplied in float64 and rounded once."""
        return self.multiply([core.double() for core in self.cores]).to(self.grad.dtype)

    def multiply(self, cores: Sequence[Tensor]) -> Tensor:
        """The table of these cores, without the rows that pad it."""
        case = self.case
        whole = torch.einsum(case.cores.equation(), *cores)
        return whole.reshape(math.prod(case.vocab_modes), case.dim)[: case.vocab]

    def digits(self) -> list[Tensor]:
        """The indices of the slices of every core."""
        return list(torch.unravel_index(self.indices, self.case.vocab_modes))

    def fault(self, outputs: Sequence[Tensor], slack: float = 1.0) -> str | None:
        """What is wrong with a candidate's outputs, or None; they come in the order of ``names``."""
        errors = {
            name: distance(got, want)
            for name, got, want in zip(self.names, outputs, self.expected, strict=False)
        }
        return exceeded(errors, self.case.dtype or "float32", slack)

    def call(self, forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> Any:
        """A call on the indices: the output alone, or a training step with gradients of ``parameters``.

        On the CPU every call after the first two, which are compared with the answer, takes other random
        indices: nobody looks up the same rows again and again, and the same rows lie in the cache.
        """
        sets = itertools.chain(
            itertools.repeat(self.indices.clone(), _COMPARED), itertools.cycle(self.others())
        )
        if not self.training:
            return lambda: (forward(next(sets)),)
        return step(lambda: forward(next(sets)), parameters, self.grad)

    def others(self) -> list[Tensor]:
        """More indices, as many sets as their rows of a dense table fill twice the last cache."""
        if self.device != "cpu":
            return [self.indices]  # a captured graph reads one set
        case, generator = self.case, torch.Generator().manual_seed(1)
        rows = 2 * _CACHE // (case.dim * self.grad.element_size())
        count = min(max(2, -(-rows // case.rows)), _MOST_SETS)
        return [torch.randint(case.vocab, (case.rows,), generator=generator) for _ in range(count)]

    def macs(self) -> int:
        """Multiply-adds with every prefix (or suffix) that several indices share multiplied once."""
        spec, digits = self.case.cores, self.digits()
        return min(_shared(spec.shapes, digits), _shared(_mirrored(spec.shapes), digits[::-1]))

    def bytes_least(self) -> int:
        """Bytes of the cores and of the output."""
        return (self.case.cores.numel + self.case.rows * self.case.dim) * self.grad.element_size()

    def work(self) -> tuple[int, int]:
        """FLOPs and bytes as :func:`roofline.work` counts them; the indices are eight bytes each."""
        size, macs = self.grad.element_size(), self.macs()
        moved, cores = 8 * self.case.rows + self.bytes_least(), size * self.case.cores.numel
        if not self.training:
            return 2 * macs, moved
        return 6 * macs, 2 * moved + cores  # the gradient is read, cores are read again, theirs written

    def _answer(self) -> list[Tensor]:
        cores = [core.double().requires_grad_(self.training) for core in self.cores]
        y = self.multiply(cores)[self.indices]
        if not self.training:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, cores, self.grad.double())]


def _mirrored(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [(right, vocab, dim, left) for left, vocab, dim, right in reversed(shapes)]


def _shared(shapes: Sequence[tuple[int, ...]], digits: Sequence[Tensor]) -> int:
    """Multiply-adds from the first core to the last, each distinct prefix of digits once."""
    prefix, dims, total = digits[0], shapes[0][2], 0
    ring, last = shapes[0][0], len(shapes) - 1
    for k in range(1, len(shapes)):
        left, vocab, dim, right = shapes[k]
        prefix = prefix * vocab + digits[k]
        brought = 1 if k == last else right  # the last core closes the ring: its right rank is summed too
        total += int(prefix.unique().numel()) * ring * dims * left * dim * brought
        dims *= dim
    return total
