"""Tucker-2 convolution: schema, fake kernels, autograd, autocast and the public functions.

The native library (``csrc/ops/tucker2_conv.cpp``) serves CPU float32 and bfloat16; whatever it cannot take
goes to the oracle, and :func:`native_support` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _native, reference
from .._native import Support
from ._conv_arguments import (
    Geometry,
    IntOrPair,
    check_arguments,
    check_factors,
    check_tensor,
    resolve_geometry,
)
from ._register import (
    define,
    fallthrough_autograd,
    refuse_transforms,
    register_autocast,
    register_autograd,
    register_default,
)
from ._transforms import transformed
from ._tucker2_conv_autograd import autograd_kernel, native_conv2d, oracle_gradients

_NAME = "tucker2_conv2d"
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_OPS = torch.ops.tensorcomp
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch.is_autocast_enabled


def native_support(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
) -> Support:
    """Whether the native kernel takes this problem, and the reason when it does not."""
    if x.is_cpu:
        loaded = _native.status()
        if loaded.ok and x.dtype not in _NATIVE_DTYPES:
            return Support(False, f"the native CPU kernel takes float32 and bfloat16, not {x.dtype}")
        return loaded
    return Support(False, f"there is no native {_NAME} for device {x.device.type!r}")


def tucker2_conv2d(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Two-dimensional convolution with a Tucker-2 weight, fused into one pass.

    ``W[t,s,y,x] = sum_ab factor_out[t,b] core[b,a,y,x] factor_in[s,a]``; the result equals
    ``torch.nn.functional.conv2d(x, W, bias, stride, padding, dilation)``. The rank-space activations are
    never stored whole: forward keeps a few rows of them in cache, backward computes them again. Inside
    ``torch.func`` transforms and forward-mode differentiation the reference computes, from torch operations.

    Args:
        x: input ``[N, C_in, H, W]``, contiguous, channels-last or any strides; native code takes float32 and
            bfloat16.
        core: ``[R_out, R_in, kH, kW]``.
        factor_out: ``[C_out, R_out]``.
        factor_in: ``[C_in, R_in]``.
        bias: ``[C_out]`` or None.
        stride, dilation: int or pair.
        padding: int, pair, four ints (top, bottom, left, right), "same" or "valid".
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[N, C_out, H', W']`` in the memory format of ``x``.

    Cost: ``N (H W C_in R_in + H' W' (kH kW R_in R_out + R_out C_out))`` MACs.

    Raises:
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Tucker 1966; Kim et al. 2016.
    """
    check_tensor(core, "core", 4, "[R_out, R_in, kH, kW]")
    geometry = resolve_geometry(core.shape[2:], stride, padding, dilation)
    check_arguments(x, core, factor_out, factor_in, bias, geometry)
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{_NAME}: backend must be None, 'native' or 'reference', got {backend!r}")
    if backend != "reference":
        support = native_support(x, core, factor_out, factor_in, bias)
        if support.ok:
            if _is_compiling():
                return _OPS.tucker2_conv2d.default(x, core, factor_out, factor_in, bias, *geometry)
            if not transformed():
                if _is_autocast_enabled("cpu"):
                    return _OPS.tucker2_conv2d.default(x, core, factor_out, factor_in, bias, *geometry)
                return native_conv2d(x, core, factor_out, factor_in, bias, geometry)
            if backend is None:
                return reference.tucker2_conv2d(x, core, factor_out, factor_in, bias, *geometry)
            support = Support(False, "function transforms and forward-mode AD go to the reference")
        if backend == "native":
            raise ValueError(f"{_NAME}: backend='native' cannot serve: {support.reason}")
    return _forward(x, core, factor_out, factor_in, bias, *geometry)


def pack_tucker2(core: Tensor, factor_out: Tensor, factor_in: Tensor) -> Tensor:
    """Copy the three weights once into the order the native kernel reads; for :func:`tucker2_conv2d_packed`.

    Returns an opaque one-dimensional tensor, valid for the instruction set in use now.

    Raises:
        ValueError, TypeError: as :func:`tucker2_conv2d`.
    """
    check_factors(core, factor_out, factor_in, None)
    return torch.ops.tensorcomp.tucker2_conv2d_pack(core.detach(), factor_out.detach(), factor_in.detach())


def packed_geometry(core_shape: Sequence[int], c_in: int, c_out: int, geometry: Geometry) -> list[int]:
    """The integers that ``torch.ops.tensorcomp.tucker2_conv2d_packed`` takes beside its tensors."""
    return [*core_shape, c_in, c_out, *geometry.stride, *geometry.padding, *geometry.dilation]


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
        return _OPS.tucker2_conv2d_packed.default(x, packed, bias, numbers)
    return bind_packed(packed, numbers)(x, bias)


def bind_packed(packed: Tensor, geometry: list[int]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The op of packed weights as a function of x and bias, for calls that no transform sees."""
    op = _OPS.tucker2_conv2d_packed.default
    below_autograd = torch._C._AutoDispatchBelowAutograd

    def call(x: Tensor, bias: Tensor | None) -> Tensor:
        with below_autograd():
            y: Tensor = op(x, packed, bias, geometry)
            return y

    return call


# --- registration ---

_SCHEMAS = {
    "tucker2_conv2d": "(Tensor x, Tensor core, Tensor factor_out, Tensor factor_in, Tensor? bias=None, "
    "int[2] stride=1, int[2] padding=0, int[2] dilation=1) -> Tensor",
    "tucker2_conv2d_backward": "(Tensor grad, Tensor x, Tensor core, Tensor factor_out, Tensor factor_in, "
    "int[2] stride, int[2] padding, int[2] dilation, int output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "tucker2_conv2d_pack": "(Tensor core, Tensor factor_out, Tensor factor_in) -> Tensor",
    "tucker2_conv2d_packed": "(Tensor x, Tensor packed, Tensor? bias, int[] geometry) -> Tensor",
}
"""Also written in ``csrc/ops/tucker2_conv.cpp``, so that a C++ process has them; a test compares the two."""


def _forward(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
) -> Tensor:
    y = reference.tucker2_conv2d(x, core, factor_out, factor_in, bias, stride, padding, dilation)
    return y.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def _mask_bits(output_mask: int) -> list[bool]:
    return [bool(output_mask >> bit & 1) for bit in range(5)]


def _backward_default(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: int,
) -> tuple[Tensor, ...]:
    geometry = resolve_geometry(core.shape[2:], stride, padding, dilation)
    mask = _mask_bits(output_mask)
    gradients = oracle_gradients(grad, (x, core, factor_out, factor_in), geometry, mask, create_graph=False)
    layout = torch._prims_common.suggest_memory_format(x)
    if gradients[0] is not None:
        gradients[0] = gradients[0].contiguous(memory_format=layout)
    return tuple(
        x.new_empty(0) if g is None else g if i == 0 else g.contiguous() for i, g in enumerate(gradients)
    )


def _pack_without_native(core: Tensor, factor_out: Tensor, factor_in: Tensor) -> Tensor:
    raise RuntimeError(f"{_NAME}_pack: {_native.status().reason or 'packing is for CPU tensors only'}")


def _packed_without_native(x: Tensor, packed: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
    raise RuntimeError(
        f"{_NAME}_packed: {_native.status().reason or 'packed weights are for CPU tensors only'}"
    )


def _fake_forward(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
) -> Tensor:
    geometry = resolve_geometry(core.shape[2:], stride, padding, dilation)
    check_arguments(x, core, factor_out, factor_in, bias, geometry)
    rows, columns = geometry.output_size(x.shape[2:], core.shape[2:])
    layout = torch._prims_common.suggest_memory_format(x)
    return torch.empty(
        (x.shape[0], factor_out.shape[0], rows, columns), dtype=x.dtype, device=x.device, memory_format=layout
    )


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: int,
) -> tuple[Tensor, ...]:
    layout = torch._prims_common.suggest_memory_format(x)
    shapes = (x.shape, core.shape, factor_out.shape, factor_in.shape, (factor_out.shape[0],))
    return tuple(
        x.new_empty(0)
        if not wanted
        else torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        if index == 0
        else x.new_empty(shape)
        for index, (shape, wanted) in enumerate(zip(shapes, _mask_bits(output_mask), strict=True))
    )


def _fake_packed(x: Tensor, packed: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
    layout = torch._prims_common.suggest_memory_format(x)
    resolved = Geometry((geometry[6], geometry[7]), tuple(geometry[8:12]), (geometry[12], geometry[13]))  # type: ignore[arg-type]
    rows, columns = resolved.output_size(x.shape[2:], geometry[2:4])
    return torch.empty(
        (x.shape[0], geometry[5], rows, columns), dtype=x.dtype, device=x.device, memory_format=layout
    )


for _op, _schema in _SCHEMAS.items():
    define(_op, _schema)
register_default("tucker2_conv2d", _forward, _fake_forward)
register_default("tucker2_conv2d_backward", _backward_default, _fake_backward)
register_default("tucker2_conv2d_pack", _pack_without_native, None)
register_default("tucker2_conv2d_packed", _packed_without_native, _fake_packed)
register_autograd("tucker2_conv2d", autograd_kernel)
register_autocast("tucker2_conv2d", tensors=5)
fallthrough_autograd("tucker2_conv2d_backward")
fallthrough_autograd("tucker2_conv2d_pack")
refuse_transforms("tucker2_conv2d_packed", instead="tucker2_conv2d")
