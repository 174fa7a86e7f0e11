"""Tucker-2 convolutions for inference, with weights packed once into the order a native kernel reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from . import _cuda
from ._conv_arguments import Geometry, IntOrPair, check_factors, resolve_geometry
from ._conv_defaults import new_image
from ._register import define, fallthrough_autograd, refuse_transforms, register_default
from ._transforms import transformed

_OPS = torch.ops.tensorcomp
_SIZES = 14
_is_compiling = torch.compiler.is_compiling


def pack_tucker2(core: Tensor, factor_out: Tensor, factor_in: Tensor) -> Tensor:
    """Copy the three weights once into the order the native kernel reads; for :func:`tucker2_conv2d_packed`.

    Returns an opaque one-dimensional tensor, valid for the device and the instruction set in use now.

    Raises:
        ValueError, TypeError: as :func:`tucker2_conv2d`.
        RuntimeError: there is no native code for the device or the dtype.
    """
    check_factors(core, factor_out, factor_in, None)
    return torch.ops.tensorcomp.tucker2_conv2d_pack(core.detach(), factor_out.detach(), factor_in.detach())


def packed_geometry(
    core_shape: Sequence[int], c_in: int, c_out: int, geometry: Geometry, allow_tf32: bool | None = None
) -> list[int]:
    """The integers that ``torch.ops.tensorcomp.tucker2_conv2d_packed`` takes beside its tensors.

    On CUDA the op takes one more, ``allow_tf32``. Left out here, :func:`bind_packed` and :func:`bind_tail`
    ask torch for it at every call.
    """
    numbers = [*core_shape, c_in, c_out, *geometry.stride, *geometry.padding, *geometry.dilation]
    return numbers if allow_tf32 is None else [*numbers, int(allow_tf32)]


def tucker2_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    core_shape: Sequence[int],
    c_out: int,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
) -> Tensor:
    """:func:`tucker2_conv2d` for inference, with weights from :func:`pack_tucker2`. Not differentiable.

    Raises:
        ValueError: sizes that do not fit.
        RuntimeError: ``packed`` was made for other sizes, another dtype or another instruction set; or a
            function transform or forward-mode AD is on.
    """
    geometry = resolve_geometry(core_shape[2:], stride, padding, dilation)
    numbers = packed_geometry(core_shape, x.shape[1], c_out, geometry)
    if _is_compiling() or transformed():
        if x.is_cuda:
            numbers.append(int(_cuda.convolution_tf32(x)))
        return _OPS.tucker2_conv2d_packed.default(x, packed, bias, numbers)
    return bind_packed(packed, numbers)(x, bias)


def bind_packed(packed: Tensor, geometry: list[int]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The op of packed weights as a function of x and bias, for calls that no transform sees."""
    return _bind(_OPS.tucker2_conv2d_packed.default, packed, geometry)


def bind_tail(packed: Tensor, geometry: list[int]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """All but the first pointwise stage as a function of ``z`` and bias, for calls that no transform sees.

    ``z``, the input in rank space, is ``[N, R_in, H, W]`` of any strides; the output ``[N, C_out, H', W']``
    has its memory format. ``packed`` and ``geometry`` are those of the whole convolution. CUDA only.
    """
    return _bind(_OPS.tucker2_conv2d_tail.default, packed, geometry)


def _bind(
    op: Callable[..., Tensor], packed: Tensor, geometry: list[int]
) -> Callable[[Tensor, Tensor | None], Tensor]:
    below_autograd = torch._C._AutoDispatchBelowAutograd

    def call(x: Tensor, bias: Tensor | None) -> Tensor:
        with below_autograd():
            return op(x, packed, bias, geometry)

    if not packed.is_cuda or len(geometry) > _SIZES:
        return call
    exact, rounded = [*geometry, 0], [*geometry, 1]
    convolution_tf32 = _cuda.convolution_tf32

    def call_as_torch_allows(x: Tensor, bias: Tensor | None) -> Tensor:
        with below_autograd():
            return op(x, packed, bias, rounded if convolution_tf32(x) else exact)

    return call_as_torch_allows


# --- registration ---

SCHEMAS = {
    "tucker2_conv2d_pack": "(Tensor core, Tensor factor_out, Tensor factor_in) -> Tensor",
    "tucker2_conv2d_packed": "(Tensor x, Tensor packed, Tensor? bias, int[] geometry) -> Tensor",
}
"""Also written in ``csrc/ops``; the tail, which the CPU library does not have, stands here alone."""


def _pack_without_native(core: Tensor, factor_out: Tensor, factor_in: Tensor) -> NoReturn:
    raise RuntimeError(f"tucker2_conv2d_pack: {_cuda.no_packing(core.device)}")


def _packed_without_native(x: Tensor, packed: Tensor, bias: Tensor | None, geometry: list[int]) -> NoReturn:
    raise RuntimeError(f"tucker2_conv2d_packed: {_cuda.no_packing(x.device)}")


def _tail_without_native(z: Tensor, packed: Tensor, bias: Tensor | None, geometry: list[int]) -> NoReturn:
    raise RuntimeError(f"tucker2_conv2d_tail: {_cuda.no_cuda_form(z.device)}")


def _fake_packed(x: Tensor, packed: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
    resolved = Geometry((geometry[6], geometry[7]), tuple(geometry[8:12]), (geometry[12], geometry[13]))  # type: ignore[arg-type]
    return new_image(x, geometry[5], resolved.output_size(x.shape[2:], geometry[2:4]))


for _op, _schema in SCHEMAS.items():
    define(_op, _schema)
define("tucker2_conv2d_tail", "(Tensor z, Tensor packed, Tensor? bias, int[] geometry) -> Tensor")
register_default("tucker2_conv2d_pack", _pack_without_native, None)
register_default("tucker2_conv2d_packed", _packed_without_native, _fake_packed)
register_default("tucker2_conv2d_tail", _tail_without_native, _fake_packed)
fallthrough_autograd("tucker2_conv2d_pack")
refuse_transforms("tucker2_conv2d_packed", instead="tucker2_conv2d")
refuse_transforms("tucker2_conv2d_tail", instead="tucker2_conv2d")
