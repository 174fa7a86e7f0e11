"""Programs and problems that the tests of the chain share, on any device and in any dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pair_problems import PairCase
from torch import Tensor
from tucker2_problems import Device

from tensorcomp_ext import reference
from tensorcomp_ext.ops import Program, Step


def pair(c_in: int, rank: int, c_out: int) -> Program:
    """Two matrices, one after the other."""
    return Program((c_in,), (Step((0,), (rank,), (0,)), Step((0,), (c_out,), (0,))))


def tensor_train_matrix(out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]) -> Program:
    """Cores ``[R_k, J_k, I_k, R_k+1]`` from left to right; a ring where the first rank is above one."""
    ring = ranks[0]
    # A row before step k: [ring,] J_0 .. J_k-1, R_k, I_k ..; the step sums R_k and I_k, brings J_k and R_k+1.
    steps = []
    for k, (out_mode, rank) in enumerate(zip(out_modes, ranks[1:], strict=True)):
        rest = len(in_modes) - k - 1
        if k == 0:
            left, contracted = 0, (0,)
            new = (ring, out_mode, rank) if ring > 1 else (out_mode, rank)
        else:
            left = k + (ring > 1)
            contracted, new = (left, left + 1), (out_mode, rank)
        if k == len(in_modes) - 1:
            new = (out_mode,)
            if ring > 1:  # the ring index of the first core closes with the last
                left, contracted = left - 1, (0, *contracted)
        kept = left + rest
        order = (*range(left), *range(kept, kept + len(new)), *range(left, kept))
        steps.append(Step(contracted, new, order))
    return Program(tuple(in_modes), tuple(steps))


PROGRAMS = {
    "one matrix": Program((12,), (Step((0,), (7,), (0,)),)),
    "pair": pair(12, 5, 9),
    "rank 1": pair(33, 1, 17),
    "vector widths": pair(64, 16, 48),
    "odd widths": pair(129, 31, 65),
    "wide rank": pair(40, 130, 70),
    "size 1": Program((1,), (Step((0,), (1,), (0,)),)),
    "middle dim": Program((3, 5, 7), (Step((1,), (4,), (2, 0, 1)),)),
    "last dim first": Program((4, 6), (Step((0,), (5,), (1, 0)), Step((1,), (3,), (1, 0)))),
    "far dims": Program((3, 4, 5), (Step((2, 0), (2, 3), (1, 0, 2)),)),
    "reversed": Program((2, 3, 4, 5), (Step((3, 1), (7, 2), (3, 1, 2, 0)), Step((2, 0), (6,), (1, 2, 0)))),
    "kept outside": Program((18, 3), (Step((1,), (5,), (0, 1)), Step((0,), (4,), (1, 0)))),
    "train": tensor_train_matrix((4, 3, 5), (5, 4, 6), (1, 3, 2, 1)),
    "train of 16": tensor_train_matrix((16, 16, 16), (16, 16, 16), (1, 8, 4, 1)),
    "odd train": tensor_train_matrix((7, 3, 9), (5, 11, 17), (1, 6, 13, 1)),
    "ring": tensor_train_matrix((4, 3, 5), (5, 4, 6), (3, 2, 4, 3)),
    "ring of two": tensor_train_matrix((6, 5), (9, 8), (2, 7, 2)),
    "back to all": Program(
        (6,), (Step((0,), (2, 5), (1, 0)), Step((1,), (3,), (0, 1)), Step((0, 1), (8,), (0,)))
    ),
}
"""One matrix, pairs, inner and scattered dims, tensor trains, rings; sizes around the vector widths."""


@dataclass(frozen=True)
class ChainCase:
    """A program, and the rows it is given; ``layout`` is how x and the matrices lie in memory."""

    program: str = "train"
    rows: tuple[int, ...] = (7,)
    bias: bool = True
    layout: str = "contiguous"

    def make(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> ChainArguments:
        program = PROGRAMS[self.program]
        lay = PairCase(layout=self.layout)._laid

        def placed(tensor: Tensor) -> Tensor:
            target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
            return target.copy_(tensor)

        x = placed(lay(torch.randn(*self.rows, program.in_features)))
        matrices = [placed(lay(torch.randn(s) / math.sqrt(s[1]))) for s in program.matrix_shapes()]
        bias = torch.randn(program.out_features).to(device, dtype) if self.bias else None
        return ChainArguments(x, matrices, bias, program)

    def but(self, **changes: Any) -> ChainCase:
        return replace(self, **changes)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(ChainCase, k)}
        return "-".join(f"{k}={v}".replace(" ", "") for k, v in changed.items()) or "default"


@dataclass(frozen=True)
class ChainArguments:
    """What a call takes."""

    x: Tensor
    matrices: list[Tensor]
    bias: Tensor | None
    program: Program

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that can have a gradient, in the order of the backward op."""
        return [self.x, *([] if self.bias is None else [self.bias]), *self.matrices]

    def leaves(self, needed: Sequence[bool] | None = None) -> ChainArguments:
        """The same with tensors that ask for gradients, strides kept; ``needed`` by x, bias, matrices."""
        needed = needed or (True,) * (2 + len(self.matrices))
        of_x, of_bias, *others = needed
        return ChainArguments(
            self.x.detach().requires_grad_(of_x),
            [m.detach().requires_grad_(n) for m, n in zip(self.matrices, others, strict=True)],
            None if self.bias is None else self.bias.detach().requires_grad_(of_bias),
            self.program,
        )

    def exact(self) -> ChainArguments:
        return ChainArguments(
            self.x.detach().double(),
            [m.detach().double() for m in self.matrices],
            None if self.bias is None else self.bias.detach().double(),
            self.program,
        )


def chain_oracle(arguments: ChainArguments) -> Tensor:
    a = arguments.exact()
    return reference.chain(a.x, a.matrices, a.bias, *a.program)


def chain_gradients(arguments: ChainArguments, grad: Tensor) -> list[Tensor]:
    """Float64 gradients of x, the bias (if there is one) and the matrices."""
    a = arguments.exact().leaves()
    with torch.enable_grad():
        y = reference.chain(a.x, a.matrices, a.bias, *a.program)
    return list(torch.autograd.grad(y, a.tensors, grad.double()))
