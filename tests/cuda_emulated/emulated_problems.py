"""What the emulator's tests share: calls of the emulated ops, their tolerances and checks, problems."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bottleneck_problems import BottleneckCase
from cuda_problems import MODES, Problem, convolution, pair
from pair_problems import PairCase
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from tucker2_problems import Case, relative

from tensorcomp_ext.ops._conv_arguments import Geometry
from tensorcomp_ext.ops.tucker2_packed import packed_geometry

NAMESPACE = "tensorcomp_emulated"
OPS = (
    "tucker2_conv2d",
    "tucker2_conv2d_backward",
    "tucker2_conv2d_pack",
    "tucker2_conv2d_packed",
    "tucker2_conv2d_tail",
    "bottleneck_conv2d",
    "bottleneck_conv2d_backward",
    "two_factor_linear",
    "two_factor_linear_backward",
    "two_factor_linear_pack",
    "two_factor_linear_packed",
    "chain",
    "chain_backward",
    "chain_pack",
    "chain_packed",
    "ttm_embedding",
    "ttm_embedding_backward",
    "lowrank_sparse_weight",
    "lowrank_sparse_weight_backward",
    "lowrank_sparse_linear",
    "lowrank_sparse_linear_backward",
)
WITH_REFERENCE = tuple(op for op in OPS if not op.endswith(("pack", "packed", "tail")))
"""Ops that go to a reference where the kernels cannot serve; the others raise."""

FORWARD_TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1e-2}
GRADIENT_TOLERANCE = {"float32": 1e-5, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 2e-2}


def of(case: Case) -> BottleneckCase:
    """The same case, for the functions that know rings and depthwise cores too."""
    return BottleneckCase(**vars(case))


def pair_problem(case: PairCase, mode: str) -> Problem:
    """The case as a call of ``two_factor_linear``, x and factors in its layout."""
    return pair((1,), 1, 1, 1, mode, "cpu").but(case.make(MODES[mode]))


# --- calls ---


def forward(ops: Any, problem: Problem) -> Tensor:
    return getattr(ops, problem.op)(*problem.arguments())


def backward(ops: Any, problem: Problem, grad: Tensor, mask: int | None = None) -> tuple[Tensor, ...]:
    """Every gradient, or those of ``mask``."""
    everything = (1 << len(problem.names)) - 1
    arguments = problem.backward_arguments(grad, everything if mask is None else mask)
    return getattr(ops, f"{problem.op}_backward")(*arguments)


def random_grad(problem: Problem) -> Tensor:
    return torch.randn(problem.oracle().shape).to(problem.given["x"].dtype)


def geometry(problem: Problem, allow_tf32: bool | None = None) -> list[int]:
    """The ints behind packed weights: 14, or 15 with ``allow_tf32``."""
    core, factor_out, factor_in = (problem.given[n] for n in ("core", "factor_out", "factor_in"))
    window = Geometry(*(tuple(part) for part in problem.rest[:3]))
    return packed_geometry(core.shape, factor_in.shape[0], factor_out.shape[0], window, allow_tf32)


@contextmanager
def no_reference() -> Iterator[list[str]]:
    """Ops that call a reference for CPU tensors fail; the list names those that did."""
    called: list[str] = []
    with torch.library._scoped_library("tensorcomp", "IMPL") as library:
        for op in WITH_REFERENCE:

            def refuse(*_: Any, _op: str = op) -> None:
                called.append(_op)
                raise RuntimeError(f"{_op} went to the reference")

            library.impl(f"{op}_reference", refuse, "CPU")
        yield called


@contextmanager
def mallopt(byte: int) -> Iterator[bool]:
    """Every byte of fresh memory is ``byte``; nothing happens, and False, without glibc."""
    perturb = -6  # M_PERTURB: memory starts as the complement of the value's low byte
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    works = set_option is not None and set_option(perturb, 0x100 | (byte ^ 0xFF)) == 1
    try:
        yield works
    finally:
        if set_option is not None:
            set_option(perturb, 0)


# --- checks ---


def check_forward(ops: Any, problem: Problem) -> Tensor:
    """The kernels, and no reference, against the oracle in float64."""
    expected = problem.oracle()
    with no_reference():
        y = forward(ops, problem)
    assert y.dtype == MODES[problem.mode]
    assert relative(y, expected) <= FORWARD_TOLERANCE[problem.mode]
    return y


def check_gradients(ops: Any, problem: Problem, grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """Every gradient against the oracle's, also that of a bias which is not given."""
    grad = random_grad(problem) if grad is None else grad
    with no_reference():
        found = backward(ops, problem, grad)
    compare_gradients(problem, grad, found)
    return found


def compare_gradients(
    problem: Problem, grad: Tensor, found: tuple[Tensor, ...], mask: int | None = None
) -> None:
    """Those of ``mask`` agree with the oracle's, the others are empty."""
    constant = problem.tensors[-1]
    if constant is None:
        constant = problem.given["x"].new_zeros(grad.shape[-1 if problem.op.startswith("two") else 1])
    expected = problem.but([*problem.tensors[:-1], constant]).oracle_gradients(grad)
    assert len(found) == len(problem.names)
    for bit, (name, gradient) in enumerate(zip(problem.names, found, strict=True)):
        assert gradient.dtype == MODES[problem.mode], name
        if mask is not None and not mask >> bit & 1:
            assert gradient.shape == (0,), name
        else:
            assert relative(gradient, expected[name]) <= GRADIENT_TOLERANCE[problem.mode], name


def check_like_fake(op: str, found: Tensor | tuple[Tensor, ...], *arguments: Any) -> None:
    """Shapes, strides and dtypes are what the op's shape function says."""
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, arguments)
        expected = getattr(torch.ops.tensorcomp, op)(*fakes)
    ours, theirs = ((found,), (expected,)) if isinstance(found, Tensor) else (found, expected)
    for i, (tensor, fake) in enumerate(zip(ours, theirs, strict=True)):
        assert tensor.shape == fake.shape and tensor.dtype == fake.dtype, i
        assert tensor.stride() == fake.stride(), (i, tensor.stride(), fake.stride())
        assert tensor.storage_offset() == fake.storage_offset() == 0, i


# --- views of the same numbers ---


def inside(tensor: Tensor) -> Tensor:
    """The same values, every other element of every dimension of a larger tensor that is NaN elsewhere."""
    wide = tensor.new_full([2 * n + 1 for n in tensor.shape], float("nan"))
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def shifted(tensor: Tensor, elements: int = 1) -> Tensor:
    """The same values and strides, that many elements behind an aligned address, NaN on both sides."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.new_full((max(span, 0) + 2 * elements,), float("nan"))
    return storage.as_strided(tensor.shape, tensor.stride(), elements).copy_(tensor)


def turned(tensor: Tensor) -> Tensor:
    """The same values with the dimensions the other way round in memory."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """The same values with a stride of more than 2^31 elements, in memory of which few pages are real."""
    strides = list(tensor.stride())
    strides[dim] = 2**31 + 8
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, span * tensor.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


SMALL = BottleneckCase(n=2, c_in=7, c_out=9, size=(5, 6), rank_in=6, rank_out=5)
CONVOLUTIONS: dict[str, Callable[[str], Problem]] = {
    "tucker2": lambda mode: convolution(SMALL, mode, "cpu"),
    "bottleneck": lambda mode: convolution(SMALL, mode, "cpu", op="bottleneck_conv2d"),
    "ring": lambda mode: convolution(SMALL.but(ring=3, rank_in=4, stride=(2, 1)), mode, "cpu"),
    "depthwise": lambda mode: convolution(SMALL.but(depthwise=True, rank_in=17, bias=False), mode, "cpu"),
}
EVERY_OP = CONVOLUTIONS | {"pair": lambda mode: pair_problem(PairCase(rows=(3, 5), c_in=18), mode)}
