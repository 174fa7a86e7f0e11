"""Linear layer whose weight is a low-rank matrix plus a sparse one that lies packed.

``csrc/ops`` serves CPU float32 and bfloat16, ``csrc/ops/cuda`` CUDA float32, float16 and bfloat16 for few
rows; whatever they cannot take goes to the oracle, and :func:`native_support` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .. import _native
from .._native import Support
from . import _cuda
from ._conv_arguments import check_tensor
from ._lowrank_sparse_linear_autograd import SCHEMAS as _DIFFERENTIABLE
from ._lowrank_sparse_linear_autograd import autograd_kernel, gradients, native_linear, oracle
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
from .lowrank_sparse_packing import PackedSparse, check_numbers, check_packed, check_parts, check_places

__all__ = [
    "bind_lowrank_sparse",
    "bind_packed_lowrank_sparse",
    "lowrank_sparse_linear",
    "lowrank_sparse_sizes",
    "native_support",
    "pack_lowrank_sparse",
]

_NAME = "lowrank_sparse_linear"
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_OPS = torch.ops.tensorcomp
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch.is_autocast_enabled


def native_support(x: Tensor, a: Tensor, b: Tensor, rows: int | None = None) -> Support:
    """Whether a native kernel takes this problem, and the reason when it does not.

    Args:
        rows: rows of x, where x stands for a batch of another size.
    """
    if x.is_cuda:
        # In a compiled graph the number of rows may be a symbol, and is not asked for.
        count = 0 if _is_compiling() else math.prod(x.shape[:-1]) if rows is None else rows
        loaded = _cuda.sparse_support(x, b.shape[1], b.shape[0], count)
        if loaded.ok and _is_compiling():
            return loaded
    elif not x.is_cpu:
        return Support(False, f"there is no native {_NAME} for device {x.device.type!r}")
    else:
        loaded = _native.status()
        if loaded.ok and not _BUILT:
            return Support(False, f"the native CPU library has no {_NAME}")
        if loaded.ok and x.dtype not in _CPU_DTYPES:
            return Support(False, f"the native CPU kernels take float32 and bfloat16, not {x.dtype}")
    if loaded.ok and 0 in (a.shape[0], b.shape[1]):
        return Support(False, "there are no features to multiply")
    return loaded


def lowrank_sparse_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    packed: PackedSparse,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with the weight ``A B + S``, where S lies packed; neither is made dense.

    ``y = (x Bᵀ) Aᵀ + x Sᵀ + bias``. A weight in mode "masking" goes here with the values ``S - A B`` at the
    places that are kept. Gradients reach x, a, b, ``packed.values`` and the bias. Inside ``torch.func``
    transforms and forward-mode differentiation the reference computes, from torch operations. On CUDA the
    kernels serve up to 32 rows; with more the reference makes S dense at every call and multiplies with the
    pair beside it, where a layer's plans keep one dense weight.

    Args:
        x: input ``[..., n]``, any strides.
        a: ``[m, r]``.
        b: ``[r, n]``.
        packed: S ``[m, n]`` from ``pack_sparse``.
        bias: ``[m]`` or None.
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[..., m]``, contiguous.

    Cost: ``r (m + n) + nnz`` MACs a row of x. Inf and NaN in x may reach more outputs than those that have an
    entry in their column: the kernels multiply some of x by the zeros that fill up their panels.

    Raises:
        ValueError: sizes, devices or options that do not fit, a packed matrix that is not sound (where the
            CUDA kernels find that, an assertion of the device instead); ``backend="native"`` where it
            cannot serve (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Hawkins et al. 2021 (low-rank + sparse tensor compression).
    """
    check_arguments(x, a, b, packed, bias)
    values, offsets, positions, _ = packed
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{_NAME}: backend must be None, 'native' or 'reference', got {backend!r}")
    if backend != "reference":
        support = native_support(x, a, b)
        if support.ok:
            if _is_compiling() or (not transformed() and _is_autocast_enabled(x.device.type)):
                return _OPS.lowrank_sparse_linear.default(x, a, b, values, bias, offsets, positions)
            if not transformed():
                return native_linear(x, a, b, values, bias, offsets, positions)
            support = Support(False, "function transforms and forward-mode AD go to the reference")
        if backend == "native":
            raise ValueError(f"{_NAME}: backend='native' cannot serve: {support.reason}")
    if _is_compiling() or x.is_meta:  # meta tensors have no numbers to check
        return _OPS.lowrank_sparse_linear.default(x, a, b, values, bias, offsets, positions)
    check_numbers(packed, _NAME)
    return oracle(x, a, b, values, bias, offsets, positions).contiguous()


def check_arguments(x: Tensor, a: Tensor, b: Tensor, packed: PackedSparse, bias: Tensor | None) -> None:
    """Raise ``ValueError`` or ``TypeError`` naming the argument, what was expected and what was given."""
    check_weights(a, b, packed, bias)
    check_input(x, a, b, bias)


def check_weights(a: Tensor, b: Tensor, packed: PackedSparse, bias: Tensor | None) -> None:
    """What :func:`check_arguments` asks of the weights alone; the packed numbers are not looked at."""
    _check_factors(a, b, bias)
    check_parts(packed, _NAME)
    expected = (a.shape[0], b.shape[1])
    if packed.shape != expected:
        raise ValueError(f"{_NAME}: packed must be [m, n] = {list(expected)}, got {list(packed.shape)}")
    _check_values(packed.values, a)


def _check_factors(a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    check_tensor(a, "a", 2, "[m, r]", _NAME)
    check_tensor(b, "b", 2, "[r, n]", _NAME)
    if a.shape[1] == 0:
        raise ValueError(f"{_NAME}: a must be [m, r] with r >= 1, got {list(a.shape)}")
    if b.shape[0] != a.shape[1]:
        raise ValueError(f"{_NAME}: b must be [r, n] with r = {a.shape[1]}, got {list(b.shape)}")
    if bias is not None:
        check_tensor(bias, "bias", 1, "[m]", _NAME)
        if bias.shape[0] != a.shape[0]:
            raise ValueError(f"{_NAME}: bias must be [m] with m = {a.shape[0]}, got {list(bias.shape)}")


def _check_values(values: Tensor, a: Tensor) -> None:
    if values.dtype != a.dtype:
        raise TypeError(f"{_NAME}: packed.values must have a's dtype {a.dtype}, got {values.dtype}")
    if values.device != a.device:
        raise ValueError(f"{_NAME}: packed must be on a's device {a.device}, got {values.device}")


def check_input(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """What :func:`check_arguments` asks of x beside weights that fit each other."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{_NAME}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != b.shape[1]:
        raise ValueError(f"{_NAME}: x must be [..., n] with n = {b.shape[1]}, got {list(x.shape)}")
    for value, argument in ((a, "a"), (b, "b"), (bias, "bias")):
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"{_NAME}: {argument} must have x's dtype {x.dtype}, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{_NAME}: {argument} must be on x's device {x.device}, got {value.device}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{_NAME}: x must be of a floating dtype, got {x.dtype}")


def pack_lowrank_sparse(a: Tensor, b: Tensor, packed: PackedSparse) -> Tensor:
    """Copy the weight once into the order the native kernel reads; for :func:`bind_packed_lowrank_sparse`.

    On the CPU alone: the CUDA kernels read a weight as it is (:func:`bind_lowrank_sparse`).

    Returns an opaque one-dimensional tensor, valid for the instruction set in use now.

    Raises:
        ValueError, TypeError: as :func:`lowrank_sparse_linear`.
        RuntimeError: there is no native code for the device or the dtype.
    """
    check_weights(a, b, packed, None)
    check_packed(packed, f"{_NAME}_pack")
    values, offsets, positions, _ = packed
    return _OPS.lowrank_sparse_linear_pack(a.detach(), b.detach(), values.detach(), offsets, positions)


def lowrank_sparse_sizes(a: Tensor, b: Tensor) -> list[int]:
    """The integers m, r and n that ``torch.ops.tensorcomp.lowrank_sparse_linear_packed`` takes."""
    return [a.shape[0], a.shape[1], b.shape[1]]


def bind_packed_lowrank_sparse(
    packed: Tensor, sizes: Sequence[int]
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The op of a packed weight as a function of x and bias, for calls that no transform sees."""
    op: Callable[..., Tensor] = _OPS.lowrank_sparse_linear_packed.default
    below_autograd = torch._C._AutoDispatchBelowAutograd
    fixed = list(sizes)

    def call(x: Tensor, bias: Tensor | None) -> Tensor:
        with below_autograd():
            return op(x, packed, bias, fixed)

    return call


def bind_lowrank_sparse(
    a: Tensor, b: Tensor, values: Tensor, offsets: Tensor, positions: Tensor
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The op of a weight as it is, as a function of x and bias, for calls that no transform sees."""
    op: Callable[..., Tensor] = _OPS.lowrank_sparse_linear.default
    below_autograd = torch._C._AutoDispatchBelowAutograd

    def call(x: Tensor, bias: Tensor | None) -> Tensor:
        with below_autograd():
            return op(x, a, b, values, bias, offsets, positions)

    return call


# --- registration ---

SCHEMAS = _DIFFERENTIABLE | {
    "lowrank_sparse_linear_pack": "(Tensor a, Tensor b, Tensor values, Tensor offsets, Tensor positions) "
    "-> Tensor",
    "lowrank_sparse_linear_packed": "(Tensor x, Tensor packed, Tensor? bias, int[] sizes) -> Tensor",
}


def _check_op(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    positions: Tensor,
) -> None:
    _check_factors(a, b, bias)
    _check_values(values, a)
    check_places(values, offsets, positions, b.shape[1], a.shape[0], _NAME)
    check_input(x, a, b, bias)


def _forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    positions: Tensor,
) -> Tensor:
    _check_op(x, a, b, values, bias, offsets, positions)
    check_packed(_as_packed(values, offsets, positions, b), _NAME)
    return oracle(x, a, b, values, bias, offsets, positions).contiguous()


def _as_packed(values: Tensor, offsets: Tensor, positions: Tensor, b: Tensor) -> PackedSparse:
    return PackedSparse(values.contiguous(), offsets.contiguous(), positions.contiguous(), b.shape[1])


def _backward(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    offsets: Tensor,
    positions: Tensor,
    output_mask: int,
) -> tuple[Tensor, ...]:
    _check_op(x, a, b, values, None, offsets, positions)
    check_packed(_as_packed(values, offsets, positions, b), f"{_NAME}_backward")
    wanted = mask_bits(output_mask, 5)
    found = gradients(grad, (x, a, b, values), offsets, positions, wanted, create_graph=False)
    return tuple(x.new_empty(0) if g is None else g.contiguous() for g in found)


def _fake_forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    positions: Tensor,
) -> Tensor:
    _check_op(x, a, b, values, bias, offsets, positions)
    return x.new_empty((*x.shape[:-1], a.shape[0]))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    offsets: Tensor,
    positions: Tensor,
    output_mask: int,
) -> tuple[Tensor, ...]:
    shapes = (x.shape, a.shape, b.shape, values.shape, a.shape[:1])
    wanted = mask_bits(output_mask, 5)
    return tuple(x.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True))


def _fake_packed(x: Tensor, packed: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sizes[0]))


def _pack_without_native(a: Tensor, *others: Tensor) -> NoReturn:
    raise RuntimeError(f"{_NAME}_pack: {_cuda.no_packing(a.device)}")


def _packed_without_native(x: Tensor, *others: object) -> NoReturn:
    raise RuntimeError(f"{_NAME}_packed: {_cuda.no_packing(x.device)}")


for _op, _schema in SCHEMAS.items():
    define(_op, _schema)
_BUILT = torch._C._dispatch_has_kernel_for_dispatch_key(f"tensorcomp::{_NAME}", "CPU")
register_default(_NAME, _forward, _fake_forward)
register_default(f"{_NAME}_backward", _backward, _fake_backward)
register_default(f"{_NAME}_pack", _pack_without_native, None)
register_default(f"{_NAME}_packed", _packed_without_native, _fake_packed)
register_autograd(_NAME, autograd_kernel)
register_mapped(_NAME, autograd_kernel)
register_autocast(_NAME, tensors=5)
fallthrough_autograd(f"{_NAME}_backward")
fallthrough_autograd(f"{_NAME}_pack")
refuse_transforms(f"{_NAME}_packed", instead=_NAME)
