"""Problems of every op with CUDA kernels, on any device, and the checks that the tests share.

The checks take the device as a part of the problem, so that they run, and are tested, on the CPU too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from bottleneck_problems import BottleneckCase
from torch import Tensor
from tucker2_problems import NAMES, relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import bottleneck_conv, tucker2_conv

OPS = torch.ops.tensorcomp
# As an attribute of its package this is the function of the same name.
two_factor_linear = importlib.import_module("tensorcomp_ext.ops.two_factor_linear")

MODES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Dtype of each mode; "tf32" is float32 with TF32 allowed."""

FORWARD_TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1e-2}
GRADIENT_TOLERANCE = {"float32": 1e-4, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 2e-2}

PAIR_NAMES = ("x", "a", "b", "bias")


def set_precision(mode: str) -> None:
    """TF32 allowed in mode "tf32" alone; a fixture restores what was."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"


@dataclass(frozen=True)
class Problem:
    """One call of one op."""

    op: str
    mode: str
    names: tuple[str, ...]
    tensors: tuple[Tensor | None, ...]
    rest: tuple[Any, ...]
    """What the op takes behind its tensors, without allow_tf32; the oracle takes the same."""
    backward_rest: Callable[[int], tuple[Any, ...]]
    """The same for the backward op, the mask in its place."""
    module: Any
    """The module of the public function and of native_support."""
    reference: Callable[..., Tensor]

    @property
    def tf32(self) -> bool:
        return self.mode == "tf32"

    @property
    def given(self) -> dict[str, Tensor]:
        return {n: t for n, t in zip(self.names, self.tensors, strict=True) if t is not None}

    @property
    def forward_op(self) -> Any:
        return getattr(OPS, self.op).default

    @property
    def backward_op(self) -> Any:
        return getattr(OPS, f"{self.op}_backward").default

    def arguments(self) -> tuple[Any, ...]:
        """Positional arguments of the op."""
        return (*self.tensors, *self.rest, self.tf32)

    def backward_arguments(self, grad: Tensor, mask: int) -> tuple[Any, ...]:
        """Positional arguments of the backward op."""
        return (grad, *self.tensors[:-1], *self.backward_rest(mask), self.tf32)

    def support(self) -> Any:
        return self.module.native_support(*self.tensors, *self.rest)

    def call(self, *tensors: Tensor | None, backend: str | None = None) -> Tensor:
        """The public function."""
        set_precision(self.mode)
        return getattr(self.module, self.op)(*(tensors or self.tensors), *self.rest, backend=backend)

    def but(self, tensors: Sequence[Tensor | None]) -> Problem:
        return replace(self, tensors=tuple(tensors))

    def leaves(self) -> Problem:
        """The same with tensors that ask for gradients, their strides kept."""
        return self.but([t if t is None else t.detach().requires_grad_() for t in self.tensors])

    def oracle(self) -> Tensor:
        return self.reference(*(t if t is None else t.detach().double() for t in self.tensors), *self.rest)

    def oracle_gradients(self, grad: Tensor) -> dict[str, Tensor]:
        double = [t if t is None else t.detach().double().requires_grad_() for t in self.tensors]
        given = [t for t in double if t is not None]
        y = self.reference(*double, *self.rest)
        return dict(zip(self.given, torch.autograd.grad(y, given, grad.double()), strict=True))


def convolution(case: BottleneckCase, mode: str, device: str, *, op: str = "") -> Problem:
    """A problem of ``tucker2_conv2d`` where the case has its form, else of ``bottleneck_conv2d``."""
    made = case.make(MODES[mode], device)
    geometry = tuple(list(part) for part in made.geometry)
    plain = case.ring == 1 and not case.depthwise
    if op != "bottleneck_conv2d" and plain:
        return Problem(
            "tucker2_conv2d",
            mode,
            NAMES,
            made.tensors,
            geometry,
            lambda mask: (*geometry, mask),
            tucker2_conv,
            reference.tucker2_conv2d,
        )
    form = (case.ring, case.depthwise)
    return Problem(
        "bottleneck_conv2d",
        mode,
        NAMES,
        made.tensors,
        (*geometry, *form),
        lambda mask: (*geometry, mask, *form),
        bottleneck_conv,
        reference.bottleneck_conv2d,
    )


def pair(
    rows: tuple[int, ...], c_in: int, rank: int, c_out: int, mode: str, device: str, *, bias: bool = True
) -> Problem:
    """A problem of ``two_factor_linear`` with x ``[*rows, c_in]``."""
    dtype = MODES[mode]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(device, dtype)

    tensors = (
        draw(*rows, c_in),
        draw(c_out, rank, scale=rank**-0.5),
        draw(rank, c_in, scale=c_in**-0.5),
        draw(c_out) if bias else None,
    )
    return Problem(
        "two_factor_linear",
        mode,
        PAIR_NAMES,
        tensors,
        (),
        lambda mask: (mask,),
        two_factor_linear,
        reference.two_factor_linear,
    )


def misaligned(tensor: Tensor) -> Tensor:
    """The same values and strides one element behind an aligned address."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.new_empty(max(span, 0) + 1)
    moved = storage.as_strided(tensor.shape, tensor.stride(), 1)
    return moved.copy_(tensor)


# Weights differ in size by orders: each problem of this list is small and of another form.
SMALL = BottleneckCase(n=2, c_in=7, c_out=9, size=(6, 5), rank_in=6, rank_out=5)
EVERY_OP: dict[str, Callable[[str, str], Problem]] = {
    "tucker2": lambda mode, device: convolution(SMALL, mode, device),
    "tucker2 stride": lambda mode, device: convolution(
        SMALL.but(layout="channels_last", stride=2, padding=(1, 0, 2, 1), bias=False), mode, device
    ),
    "bottleneck": lambda mode, device: convolution(SMALL, mode, device, op="bottleneck_conv2d"),
    "ring": lambda mode, device: convolution(SMALL.but(ring=3, rank_in=4), mode, device),
    "depthwise": lambda mode, device: convolution(SMALL.but(depthwise=True, rank_in=17), mode, device),
    "pair": lambda mode, device: pair((3, 5), 18, 6, 11, mode, device),
    "pair without bias": lambda mode, device: pair((4,), 16, 8, 24, mode, device, bias=False),
}


# --- checks ---


def check_forward(problem: Problem, backend: str | None = None) -> Tensor:
    """The public function and the op against the oracle."""
    expected = problem.oracle()
    allowed = FORWARD_TOLERANCE[problem.mode]
    y = problem.call(backend=backend)
    assert y.dtype == MODES[problem.mode] and y.device == problem.tensors[0].device  # type: ignore[union-attr]
    assert relative(y.detach(), expected) <= allowed
    assert relative(problem.forward_op(*problem.arguments()), expected) <= allowed
    return y


def check_gradients(problem: Problem, backend: str | None = None) -> None:
    """Gradients of every tensor through the public function against the oracle's."""
    leaves = problem.leaves()
    y = leaves.call(backend=backend)
    grad = torch.randn(y.shape).to(y)
    found = torch.autograd.grad(y, list(leaves.given.values()), grad)
    expected = problem.oracle_gradients(grad)
    for (name, wanted), gradient in zip(expected.items(), found, strict=True):
        assert gradient.dtype == MODES[problem.mode] and gradient.shape == wanted.shape, name
        assert relative(gradient, wanted) <= GRADIENT_TOLERANCE[problem.mode], name


def check_masks(problem: Problem) -> None:
    """The backward op with every mask: what is asked for agrees with the oracle, the rest is empty."""
    y = problem.call()
    grad = torch.randn(y.shape).to(y)
    expected = problem.oracle_gradients(grad)
    for mask in range(1 << len(problem.names)):
        found = problem.backward_op(*problem.backward_arguments(grad, mask))
        assert len(found) == len(problem.names)
        for bit, (name, gradient) in enumerate(zip(problem.names, found, strict=True)):
            if not mask >> bit & 1:
                assert gradient.shape == (0,), (mask, name)
            elif name in expected:
                assert relative(gradient, expected[name]) <= GRADIENT_TOLERANCE[problem.mode], (mask, name)


def output_gradient(problem: Problem) -> Tensor:
    return torch.randn(problem.oracle().shape).to(problem.given["x"])


def step(problem: Problem, grad: Tensor) -> tuple[Tensor, ...]:
    """A training step of the public function: the output and every gradient. ``problem`` holds leaves."""
    y = problem.call()
    return (y.detach(), *torch.autograd.grad(y, list(problem.given.values()), grad))


def check_second_derivatives(problem: Problem) -> None:
    """Gradients of a penalty on gradients, against the same of the oracle."""

    def penalty(call: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        given = [t for t in tensors if t is not None]
        # Scaled so that float16 neither overflows nor loses digits.
        first = torch.autograd.grad((call(*tensors) / 4).square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum((g / 4).square().sum() for g in first), given)  # type: ignore[arg-type]

    found = penalty(problem.call, problem.leaves().tensors)
    double = problem.but([t if t is None else t.double() for t in problem.tensors]).leaves()
    expected = penalty(lambda *t: problem.reference(*t, *problem.rest), double.tensors)
    for name, ours, theirs in zip(problem.given, found, expected, strict=True):
        assert relative(ours, theirs) <= 2 * GRADIENT_TOLERANCE[problem.mode], name


def check_bitwise(problem: Problem, times: int = 3) -> None:
    """The same bits from run to run, forward and backward."""
    leaves = problem.leaves()
    grad = torch.randn(problem.oracle().shape).to(problem.given["x"])
    first = step(leaves, grad)
    for _ in range(times - 1):
        for name, once, again in zip(("y", *problem.given), first, step(leaves, grad), strict=True):
            assert torch.equal(once, again), name


DIFFERENCE_TOLERANCE = 2e-5
"""Of float32 sums that hold each other's rounding; a gradient that is off by 1e-4 exceeds it."""


def check_differences(problem: Problem, directions: int = 3) -> None:
    """Gradients of the backward op against differences of the forward op itself, no oracle between them.

    Every op is affine in each of its tensors alone: a central difference along a direction d is exact at
    any length, and of d's own length it loses no digits. With that difference J d as the output's
    gradient, <gradient, d> must be |J d|^2.
    """
    full = (1 << len(problem.names)) - 1

    def forward(name: str, tensor: Tensor) -> Tensor:
        replaced = [tensor if n == name else t for n, t in zip(problem.names, problem.tensors, strict=True)]
        return problem.forward_op(*problem.but(replaced).arguments()).double()

    for name, tensor in problem.given.items():
        for _ in range(directions):
            direction = (torch.randn(tensor.shape) * tensor.double().cpu().square().mean().sqrt()).to(tensor)
            ahead, behind = tensor + direction, tensor - direction
            change = (forward(name, ahead) - forward(name, behind)).to(tensor.dtype) / 2  # J d
            gradients = problem.backward_op(*problem.backward_arguments(change, full))
            gradient = gradients[problem.names.index(name)]
            # What the rounded sums really lie apart.
            found = float((gradient.double() * (ahead.double() - behind.double()) / 2).sum())
            wanted = float(change.double().square().sum())
            assert wanted > 0, name
            assert abs(found - wanted) <= DIFFERENCE_TOLERANCE * wanted, (name, found / wanted - 1)
