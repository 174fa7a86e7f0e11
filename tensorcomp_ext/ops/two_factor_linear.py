"""Linear layer with a two-factor weight: the form every linear format lowers to at its middle bond.

CPU float32 and bfloat16 are served by ``csrc/ops``, as the chain of two matrices; CUDA float32, float16 and
bfloat16 by ``csrc/ops/cuda``. Elsewhere, and where the sizes are not the kernel's, the oracle serves, two
products of torch's library; :func:`native_support` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .. import _native, reference
from .._native import Support
from . import _cuda
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
)
from ._transforms import transformed
from ._two_factor_autograd import SCHEMAS as _DIFFERENTIABLE
from ._two_factor_autograd import autograd_kernel, differentiable_two_factor, gradients, native_two_factor

__all__ = [
    "bind_packed_pair",
    "differentiable_two_factor",
    "native_support",
    "pack_two_factor",
    "two_factor_linear",
    "two_factor_sizes",
]

_NAME = "two_factor_linear"
_OPS = torch.ops.tensorcomp
_SIZES = 3
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch.is_autocast_enabled


def native_support(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Support:
    """Whether a native kernel takes this problem, and the reason when it does not."""
    if x.is_cpu:
        loaded = _native.status()
        if loaded.ok and x.dtype not in _CPU_DTYPES:
            return Support(False, f"the native CPU kernels take float32 and bfloat16, not {x.dtype}")
        if loaded.ok and 0 in (a.shape[0], b.shape[1]):
            return Support(False, "there are no features to multiply")
        return loaded
    if not x.is_cuda:
        return Support(False, f"there is no native {_NAME} for device {x.device.type!r}")
    loaded = _cuda.support(x.dtype, x.device)
    if not loaded.ok or _is_compiling():
        return loaded  # in a compiled graph the op itself decides by sizes
    return _cuda.fits_two_factor(x.device, b.shape[0], x.element_size())


def two_factor_linear(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Linear layer whose weight is the product of two factors, without forming it.

    ``y = (x bᵀ) aᵀ + bias``; the result equals ``torch.nn.functional.linear(x, a @ b, bias)``. Inside
    ``torch.func`` transforms and forward-mode differentiation the reference computes, from torch operations.

    Args:
        x: input ``[..., in]``, any strides. CUDA float32 is rounded to TF32 only where
            ``torch.backends.cuda.matmul`` allows it.
        a: ``[out, R]``.
        b: ``[R, in]``.
        bias: ``[out]`` or None.
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[..., out]``, contiguous.

    Cost: ``R (in + out)`` MACs a row of x.

    Raises:
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Eckart, Young 1936 (the best such weight).
    """
    check_arguments(x, a, b, bias)
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{_NAME}: backend must be None, 'native' or 'reference', got {backend!r}")
    if backend != "reference":
        support = native_support(x, a, b, bias)
        if support.ok:
            if _is_compiling() or (not transformed() and _is_autocast_enabled(x.device.type)):
                return _OPS.two_factor_linear.default(x, a, b, bias, matmul_tf32(x))
            if not transformed():
                return native_two_factor(x, a, b, bias, matmul_tf32(x))
            if backend is None:
                return reference.two_factor_linear(x, a, b, bias)
            support = Support(False, "function transforms and forward-mode AD go to the reference")
        if backend == "native":
            raise ValueError(f"{_NAME}: backend='native' cannot serve: {support.reason}")
    return _forward(x, a, b, bias)


def check_arguments(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Raise ``ValueError`` or ``TypeError`` naming the argument, what was expected and what was given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{_NAME}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{_NAME}: x must be [..., in], got []")
    check_factors(a, b, bias)
    if b.shape[1] != x.shape[-1]:
        raise ValueError(f"{_NAME}: b must be [R, in] with in = {x.shape[-1]}, got {list(b.shape)}")
    dtype, device = x.dtype, x.device
    for value, argument in ((a, "a"), (b, "b"), (bias, "bias")):
        if value is None:
            continue
        if value.dtype != dtype:
            raise TypeError(f"{_NAME}: {argument} must have x's dtype {dtype}, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{_NAME}: {argument} must be on x's device {device}, got {value.device}")
    if not dtype.is_floating_point:
        raise TypeError(f"{_NAME}: x must be of a floating dtype, got {dtype}")


def check_factors(a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """What :func:`check_arguments` asks of the weights alone."""
    check_tensor(a, "a", 2, "[out, R]", _NAME)
    check_tensor(b, "b", 2, "[R, in]", _NAME)
    if a.shape[1] == 0:
        raise ValueError(f"{_NAME}: a must be [out, R] with R >= 1, got {list(a.shape)}")
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"{_NAME}: b must be [R, in] with R = {a.shape[1]}, got {list(b.shape)}")
    if bias is not None:
        check_tensor(bias, "bias", 1, "[out]", _NAME)
        if bias.shape[0] != a.shape[0]:
            raise ValueError(f"{_NAME}: bias must be [out] with out = {a.shape[0]}, got {list(bias.shape)}")


def pack_two_factor(a: Tensor, b: Tensor) -> Tensor:
    """Copy both factors once into the order the native kernel reads; for :func:`bind_packed_pair`.

    Returns an opaque one-dimensional tensor.

    Raises:
        ValueError, TypeError: as :func:`two_factor_linear`.
        RuntimeError: there is no native code for the device or the dtype.
    """
    check_factors(a, b, None)
    return torch.ops.tensorcomp.two_factor_linear_pack(a.detach(), b.detach())


def two_factor_sizes(a: Tensor, b: Tensor, allow_tf32: bool | None = None) -> list[int]:
    """The integers that ``torch.ops.tensorcomp.two_factor_linear_packed`` takes beside its tensors.

    The op takes ``allow_tf32`` last. Left out here, :func:`bind_packed_pair` asks torch at every call.
    """
    sizes = [a.shape[0], a.shape[1], b.shape[1]]
    return sizes if allow_tf32 is None else [*sizes, int(allow_tf32)]


def bind_packed_pair(packed: Tensor, sizes: Sequence[int]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The op of packed factors as a function of x and bias, for calls that no transform sees."""
    op: Callable[..., Tensor] = _OPS.two_factor_linear_packed.default
    below_autograd = torch._C._AutoDispatchBelowAutograd
    exact, rounded = [*sizes[:_SIZES], 0], [*sizes[:_SIZES], 1]
    if len(sizes) > _SIZES:
        fixed = list(sizes)

        def call(x: Tensor, bias: Tensor | None) -> Tensor:
            with below_autograd():
                return op(x, packed, bias, fixed)

        return call

    def call_as_torch_allows(x: Tensor, bias: Tensor | None) -> Tensor:
        with below_autograd():
            return op(x, packed, bias, rounded if matmul_tf32(x) else exact)

    return call_as_torch_allows


# --- registration ---

SCHEMAS = _DIFFERENTIABLE | {
    "two_factor_linear_pack": "(Tensor a, Tensor b) -> Tensor",
    "two_factor_linear_packed": "(Tensor x, Tensor packed, Tensor? bias, int[] sizes) -> Tensor",
}


def _forward(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, allow_tf32: bool = False) -> Tensor:
    return reference.two_factor_linear(x, a, b, bias).contiguous()


def _backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, output_mask: int, allow_tf32: bool = False
) -> tuple[Tensor, ...]:
    found = gradients(grad, (x, a, b), mask_bits(output_mask, 4), create_graph=False)
    return tuple(x.new_empty(0) if g is None else g.contiguous() for g in found)


def _fake_forward(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, allow_tf32: bool = False
) -> Tensor:
    check_arguments(x, a, b, bias)
    return x.new_empty((*x.shape[:-1], a.shape[0]))


def _fake_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, output_mask: int, allow_tf32: bool = False
) -> tuple[Tensor, ...]:
    shapes = (x.shape, a.shape, b.shape, a.shape[:1])
    wanted = mask_bits(output_mask, 4)
    return tuple(x.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True))


def _fake_packed(x: Tensor, packed: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sizes[0]))


def _pack_without_native(a: Tensor, b: Tensor) -> NoReturn:
    raise RuntimeError(f"{_NAME}_pack: {_cuda.no_packing(a.device)}")


def _packed_without_native(x: Tensor, packed: Tensor, bias: Tensor | None, sizes: list[int]) -> NoReturn:
    raise RuntimeError(f"{_NAME}_packed: {_cuda.no_packing(x.device)}")


for _op, _schema in SCHEMAS.items():
    define(_op, _schema)
register_default(_NAME, _forward, _fake_forward)
register_default(f"{_NAME}_backward", _backward, _fake_backward)
register_default(f"{_NAME}_pack", _pack_without_native, None)
register_default(f"{_NAME}_packed", _packed_without_native, _fake_packed)
register_autograd(_NAME, autograd_kernel)
register_autocast(_NAME, tensors=4)
fallthrough_autograd(f"{_NAME}_backward")
fallthrough_autograd(f"{_NAME}_pack")
refuse_transforms(f"{_NAME}_packed", instead=_NAME)
