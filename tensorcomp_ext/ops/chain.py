"""A chain of matrix products over the modes of each row: what linear layers of every network lower to.

CPU float32 and bfloat16 are served by ``csrc/ops/chain.cpp``, CUDA float32, float16 and bfloat16 by
``csrc/ops/cuda/chain.cpp``, where they are built. Elsewhere the oracle serves, products of torch's library;
:func:`native_support` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NoReturn

import torch
from torch import Tensor

from .. import _native
from .._native import Support
from . import _cuda
from ._chain_autograd import SCHEMAS as _DIFFERENTIABLE
from ._chain_autograd import autograd_kernel, differentiable_chain, gradients, native_chain, oracle
from ._chain_program import Program, Step, check, decode
from ._conv_arguments import check_tensor
from ._cuda import matmul_tf32
from ._oracle_gradients import mask_bits
from ._register import (
    define,
    fallthrough_autograd,
    refuse_transforms,
    register_autocast,
    register_autograd,
    register_default,
    register_mapped,
)
from ._transforms import transformed

__all__ = [
    "Program",
    "Step",
    "bind_packed_chain",
    "chain",
    "differentiable_chain",
    "native_support",
    "pack_chain",
    "program_numbers",
]

_NAME = "chain"
_OPS = torch.ops.tensorcomp
_MOST = 12  # csrc/kernels/chain_program.h
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch.is_autocast_enabled


def native_support(x: Tensor, matrices: Sequence[Tensor], program: Program) -> Support:
    """Whether a native kernel takes this problem, and the reason when it does not."""
    device = x.device.type
    if device == "cpu":
        loaded = _native.status()
        if loaded.ok and x.dtype not in _CPU_DTYPES:
            return Support(False, f"the native CPU kernels take float32 and bfloat16, not {x.dtype}")
    elif device == "cuda":
        loaded = _cuda.support(x.dtype, x.device)
    else:
        return Support(False, f"there is no native {_NAME} for device {device!r}")
    if loaded.ok and not _BUILT[device]:
        return Support(False, f"the native {device.upper()} library has no {_NAME}")
    if loaded.ok and device == "cuda" and not _is_compiling():
        # In a compiled graph the op itself decides by sizes.
        return _cuda.fits_chain(x.device, program_numbers(program), x.element_size())
    longest = _described(program)[4]
    if loaded.ok and device == "cpu" and longest > _MOST:
        return Support(False, f"the native kernels take {_MOST} steps and dims, the program has {longest}")
    return loaded


def chain(
    x: Tensor,
    matrices: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    program: Program,
    backend: str | None = None,
) -> Tensor:
    """Linear map of each row of ``x``: the row's modes are contracted with one matrix after the other.

    A row is seen as a tensor of ``program.dims``. A step sums over the dims it contracts, which row-major
    index the columns of its matrix, and brings new dims, which row-major index the matrix's rows, behind
    those that are kept; then it orders them. Row-major, the last dims index the output:
    ``y = M_last(… M_1(x)) + bias``. Inside ``torch.func`` transforms and forward-mode differentiation the
    reference computes, from torch operations.

    Args:
        x: input ``[..., program.in_features]``, any strides. CUDA float32 is rounded to TF32 only where
            ``torch.backends.cuda.matmul`` allows it.
        matrices: one for each step, ``[prod(new), prod(contracted)]``.
        bias: ``[program.out_features]`` or None.
        program: what happens to every row.
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[..., program.out_features]``, contiguous.

    Cost: ``program.macs()`` MACs a row of x.

    Raises:
        ValueError: sizes, devices or options that do not fit, no such program; ``backend="native"`` where it
            cannot serve (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Novikov et al. 2015 (TT layers as such a chain).
    """
    check_arguments(x, matrices, bias, program)
    numbers = program_numbers(program)
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{_NAME}: backend must be None, 'native' or 'reference', got {backend!r}")
    if backend != "reference":
        support = native_support(x, matrices, program)
        if support.ok:
            if _is_compiling() or (not transformed() and _is_autocast_enabled(x.device.type)):
                return _OPS.chain.default(x, matrices, bias, numbers, matmul_tf32(x))
            if not transformed():
                return native_chain(x, matrices, bias, numbers, matmul_tf32(x))
            if backend is None:
                return oracle(x, matrices, bias, numbers)
            support = Support(False, "function transforms and forward-mode AD go to the reference")
        if backend == "native":
            raise ValueError(f"{_NAME}: backend='native' cannot serve: {support.reason}")
    return _forward(x, matrices, bias, numbers)


_Described = tuple[tuple[int, ...], int, int, list[tuple[int, int]], int]


@lru_cache(maxsize=4096)
def _computed(program: Program) -> _Described:
    check(program)
    counts = [len(program.dims_after(i)) for i in range(len(program.steps) + 1)]
    longest = max(len(program.steps), *counts)
    return (
        tuple(program.encode()),
        program.in_features,
        program.out_features,
        program.matrix_shapes(),
        longest,
    )


@torch.compiler.assume_constant_result
def _described(program: Program) -> _Described:
    """The program's numbers, its sizes, its matrices' shapes and the most steps or dims it has."""
    return _computed(program)


def program_numbers(program: Program) -> Sequence[int]:
    """The program as the ops take it.

    Raises:
        ValueError: no such program.
    """
    return _described(program)[0]


def check_arguments(x: Tensor, matrices: Sequence[Tensor], bias: Tensor | None, program: Program) -> None:
    """Raise ``ValueError`` or ``TypeError`` naming the argument, what was expected and what was given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{_NAME}: x must be a tensor, got {type(x).__name__}")
    _, in_features, out_features, *_ = _described(program)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"{_NAME}: x must be [..., in_features] with in_features = {in_features}, got {list(x.shape)}"
        )
    check_matrices(matrices, program)
    dtype, device = x.dtype, x.device
    named = [(matrix, f"matrices[{i}]") for i, matrix in enumerate(matrices)]
    if bias is not None:
        check_tensor(bias, "bias", 1, "[out_features]", _NAME)
        if bias.shape[0] != out_features:
            raise ValueError(
                f"{_NAME}: bias must be [out_features] with out_features = {out_features}, "
                f"got {list(bias.shape)}"
            )
        named.append((bias, "bias"))
    for value, argument in named:
        if value.dtype != dtype:
            raise TypeError(f"{_NAME}: {argument} must have x's dtype {dtype}, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{_NAME}: {argument} must be on x's device {device}, got {value.device}")
    if not dtype.is_floating_point:
        raise TypeError(f"{_NAME}: x must be of a floating dtype, got {dtype}")


def check_matrices(matrices: Sequence[Tensor], program: Program) -> None:
    """What :func:`check_arguments` asks of the matrices alone."""
    shapes = _described(program)[3]
    if not isinstance(matrices, (list, tuple)):
        raise TypeError(f"{_NAME}: matrices must be a list of tensors, got {type(matrices).__name__}")
    if len(matrices) != len(shapes):
        raise ValueError(
            f"{_NAME}: matrices must be one for each of {len(shapes)} steps, got {len(matrices)}"
        )
    for i, (matrix, (new, contracted)) in enumerate(zip(matrices, shapes, strict=True)):
        check_tensor(matrix, f"matrices[{i}]", 2, "[new, contracted]", _NAME)
        if matrix.shape[0] != new or matrix.shape[1] != contracted:
            raise ValueError(
                f"{_NAME}: matrices[{i}] must be [new, contracted] = [{new}, {contracted}], "
                f"got {list(matrix.shape)}"
            )


def pack_chain(matrices: Sequence[Tensor], program: Program) -> Tensor:
    """Copy the matrices once into the order the native kernel reads; for :func:`bind_packed_chain`.

    Returns an opaque one-dimensional tensor, valid for the device and the instruction set in use now.

    Raises:
        ValueError, TypeError: as :func:`chain`.
        RuntimeError: there is no native code for the device or the dtype.
    """
    numbers = program_numbers(program)
    check_matrices(matrices, program)
    return torch.ops.tensorcomp.chain_pack([matrix.detach() for matrix in matrices], numbers)


def bind_packed_chain(
    packed: Tensor, program: Program, tf32: bool | None = None, relu: bool = False
) -> Callable[..., Tensor]:
    """The op of packed matrices for calls that no transform sees.

    Args:
        packed: from :func:`pack_chain`.
        program: the one it was packed for.
        tf32: whether CUDA may round to TF32; None asks torch at every call.
        relu: whether negative results become zero, after bias and residual.

    Returns:
        A function of ``x``, ``bias`` and, if given, a ``residual`` ``[..., out_features]`` that is added.
    """
    op: Callable[..., Tensor] = _OPS.chain_packed.default
    below_autograd = torch._C._AutoDispatchBelowAutograd
    if not packed.is_cuda:
        as_packed: list[int] = []  # each number costs a call as much as a product of 16 by 16

        def call(x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
            with below_autograd():
                return op(x, packed, bias, as_packed, residual, relu)

        return call

    numbers = list(program_numbers(program))

    def call_cuda(x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        with below_autograd():
            return op(x, packed, bias, numbers, residual, relu, matmul_tf32(x) if tf32 is None else tf32)

    return call_cuda


# --- registration ---

SCHEMAS = _DIFFERENTIABLE | {
    "chain_pack": "(Tensor[] matrices, int[] program) -> Tensor",
    "chain_packed": "(Tensor x, Tensor packed, Tensor? bias, int[] program, Tensor? residual=None, "
    "bool relu=False, bool allow_tf32=False) -> Tensor",
}


def _forward(
    x: Tensor,
    matrices: Sequence[Tensor],
    bias: Tensor | None,
    program: Sequence[int],
    allow_tf32: bool = False,
) -> Tensor:
    check_arguments(x, matrices, bias, decode(program))
    return oracle(x, matrices, bias, program).contiguous()


def _backward(
    grad: Tensor,
    x: Tensor,
    matrices: Sequence[Tensor],
    program: Sequence[int],
    output_mask: int,
    allow_tf32: bool = False,
) -> list[Tensor]:
    check_arguments(x, matrices, None, decode(program))
    wanted = mask_bits(output_mask, 2 + len(matrices))
    found = gradients(grad, x, matrices, program, wanted, create_graph=False)
    return [x.new_empty(0) if g is None else g.contiguous() for g in found]


def _fake_forward(
    x: Tensor,
    matrices: Sequence[Tensor],
    bias: Tensor | None,
    program: Sequence[int],
    allow_tf32: bool = False,
) -> Tensor:
    decoded = decode(program)
    check_arguments(x, matrices, bias, decoded)
    return x.new_empty((*x.shape[:-1], decoded.out_features))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    matrices: Sequence[Tensor],
    program: Sequence[int],
    output_mask: int,
    allow_tf32: bool = False,
) -> list[Tensor]:
    shapes = (x.shape, grad.shape[-1:], *(matrix.shape for matrix in matrices))
    wanted = mask_bits(output_mask, len(shapes))
    return [x.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True)]


def _fake_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    program: Sequence[int],
    residual: Tensor | None = None,
    relu: bool = False,
    allow_tf32: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], decode(program).out_features))


def _pack_without_native(matrices: Sequence[Tensor], program: Sequence[int]) -> NoReturn:
    raise RuntimeError(f"{_NAME}_pack: {_cuda.no_packing(matrices[0].device)}")


def _packed_without_native(x: Tensor, *others: object) -> NoReturn:
    raise RuntimeError(f"{_NAME}_packed: {_cuda.no_packing(x.device)}")


for _op, _schema in SCHEMAS.items():
    define(_op, _schema)
# The libraries are loaded by now: which of them brought the op.
_BUILT = {
    device: torch._C._dispatch_has_kernel_for_dispatch_key(f"tensorcomp::{_NAME}", device.upper())
    for device in ("cpu", "cuda")
}
register_default(_NAME, _forward, _fake_forward)
register_default(f"{_NAME}_backward", _backward, _fake_backward)
register_default(f"{_NAME}_pack", _pack_without_native, None)
register_default(f"{_NAME}_packed", _packed_without_native, _fake_packed)
register_autograd(_NAME, autograd_kernel)
register_mapped(_NAME, autograd_kernel)
register_autocast(_NAME, tensors=3)
fallthrough_autograd(f"{_NAME}_backward")
fallthrough_autograd(f"{_NAME}_pack")
refuse_transforms(f"{_NAME}_packed", instead=_NAME)
