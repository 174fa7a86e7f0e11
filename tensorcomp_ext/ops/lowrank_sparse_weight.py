"""The dense weight of a low-rank and a sparse matrix, for layers that are trained.

``csrc/ops/lowrank_sparse_weight.cpp`` serves CPU float32 and bfloat16, ``csrc/ops/cuda`` CUDA float32,
float16 and bfloat16; whatever they cannot take goes to the oracle, and :func:`native_support` says why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._native import Support
from . import _cuda
from ._conv_arguments import check_tensor
from ._cuda import matmul_tf32
from ._lowrank_sparse_weight_autograd import SCHEMAS, autograd_kernel, gradients, native_weight, oracle
from ._oracle_gradients import mask_bits
from ._register import define, fallthrough_autograd, register_autograd, register_default, register_mapped
from ._transforms import transformed
from .lowrank_sparse_packing import check_mask

__all__ = ["lowrank_sparse_weight", "native_support", "tried_weight"]

_NAME = "lowrank_sparse_weight"
_MODES = ("additive", "masking")
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_OPS = torch.ops.tensorcomp
_is_compiling = torch.compiler.is_compiling


def native_support(a: Tensor, b: Tensor) -> Support:
    """Whether a native kernel takes this problem, and the reason when it does not."""
    if a.is_cuda:
        loaded = _cuda.support(a.dtype, a.device)
        if loaded.ok and _is_compiling():
            return loaded  # in a compiled graph the op itself decides by sizes
    elif not a.is_cpu:
        return Support(False, f"there is no native {_NAME} for device {a.device.type!r}")
    else:
        loaded = _native.status()
        if loaded.ok and not _BUILT:
            return Support(False, f"the native CPU library has no {_NAME}")
        if loaded.ok and a.dtype not in _CPU_DTYPES:
            return Support(False, f"the native CPU kernels take float32 and bfloat16, not {a.dtype}")
    if loaded.ok and 0 in (a.shape[0], b.shape[1]):
        return Support(False, "the weight is empty")
    return loaded


def lowrank_sparse_weight(
    a: Tensor, b: Tensor, values: Tensor, mask: Tensor, *, mode: str, backend: str | None = None
) -> Tensor:
    """The dense weight: a low-rank matrix with a sparse part added to it, or in place of some of it.

    ``W = A B + M * S`` in mode "additive", ``W = (1 - M) * (A B) + M * S`` in mode "masking". What the mask
    hides of S is not looked at: it may be anything, and its gradient is zero. Autocast changes nothing.
    Inside ``torch.func`` transforms and forward-mode differentiation the reference computes, from torch
    operations.

    Args:
        a: ``[m, r]``, any strides, as all arguments. A convolution's weight goes here as ``[T, S kh kw]``.
            With r = 0 there is no low-rank part, and W is what the mask keeps of S. CUDA float32 is
            rounded to TF32 only where ``torch.backends.cuda.matmul`` allows it.
        b: ``[r, n]``.
        values: S, ``[m, n]``.
        mask: M, bool ``[m, n]``, or one bit an entry, uint8 ``[m, ceil(n / 8)]`` from ``pack_mask``.
        mode: "additive" or "masking".
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[m, n]``, contiguous.

    Cost: ``m r n`` MACs; backward twice as many. Memory of the kernels: forward reads S and M once and writes
    W once; backward reads W's gradient and M, on the CPU once, on CUDA once for each of the three gradients,
    and writes that of S. No other tensor of their size is made but, on the CPU, contiguous copies of S, M or
    W's gradient where their rows are not contiguous.

    Raises:
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, dtypes that differ or a mask of another one.

    Source: Hawkins et al. 2021 (low-rank + sparse tensor compression).
    """
    check_arguments(a, b, values, mask)
    if mode not in _MODES:
        raise ValueError(f"{_NAME}: mode must be 'additive' or 'masking', got {mode!r}")
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{_NAME}: backend must be None, 'native' or 'reference', got {backend!r}")
    masking = mode == "masking"
    if backend != "reference":
        support = native_support(a, b)
        if support.ok:
            if _is_compiling():
                return _OPS.lowrank_sparse_weight.default(a, b, values, mask, masking, matmul_tf32(a))
            if not transformed():
                return native_weight(a, b, values, mask, masking, matmul_tf32(a))
            support = Support(False, "function transforms and forward-mode AD go to the reference")
        if backend == "native":
            raise ValueError(f"{_NAME}: backend='native' cannot serve: {support.reason}")
    if _is_compiling() and backend is None:
        return _OPS.lowrank_sparse_weight.default(a, b, values, mask, masking, matmul_tf32(a))
    return oracle(a, b, values, mask, masking).contiguous()


def tried_weight(a: Tensor, b: Tensor, values: Tensor, mask: Tensor, *, mode: str) -> Tensor:
    """As :func:`lowrank_sparse_weight`, for layers: by torch's operations where no kernel of ours has run."""
    tried = a.device.type in _native.TRIED_DEVICES
    return lowrank_sparse_weight(a, b, values, mask, mode=mode, backend=None if tried else "reference")


def check_arguments(a: Tensor, b: Tensor, values: Tensor, mask: Tensor) -> None:
    """Raise ``ValueError`` or ``TypeError`` naming the argument, what was expected and what was given."""
    check_tensor(a, "a", 2, "[m, r]", _NAME)
    check_tensor(b, "b", 2, "[r, n]", _NAME)
    check_tensor(values, "values", 2, "[m, n]", _NAME)
    m, r = a.shape
    n = b.shape[1]
    if b.shape[0] != r:
        raise ValueError(f"{_NAME}: b must be [r, n] with r = {r}, got {list(b.shape)}")
    if values.shape[0] != m or values.shape[1] != n:
        raise ValueError(f"{_NAME}: values must be [m, n] = {[m, n]}, got {list(values.shape)}")
    for value, argument in ((b, "b"), (values, "values")):
        if value.dtype != a.dtype:
            raise TypeError(f"{_NAME}: {argument} must have a's dtype {a.dtype}, got {value.dtype}")
        if value.device != a.device:
            raise ValueError(f"{_NAME}: {argument} must be on a's device {a.device}, got {value.device}")
    if not a.dtype.is_floating_point:
        raise TypeError(f"{_NAME}: a must be of a floating dtype, got {a.dtype}")
    check_mask(mask, values, _NAME)


# --- registration ---


def _forward(
    a: Tensor, b: Tensor, values: Tensor, mask: Tensor, masking: bool, allow_tf32: bool = False
) -> Tensor:
    check_arguments(a, b, values, mask)
    return oracle(a, b, values, mask, masking).contiguous()


def _backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor,
    masking: bool,
    output_mask: int,
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    check_arguments(a, b, grad, mask)
    found = gradients(grad, a, b, mask, masking, mask_bits(output_mask, 3), create_graph=False)
    return tuple(a.new_empty(0) if g is None else g.contiguous() for g in found)


def _fake_forward(
    a: Tensor, b: Tensor, values: Tensor, mask: Tensor, masking: bool, allow_tf32: bool = False
) -> Tensor:
    check_arguments(a, b, values, mask)
    return a.new_empty((a.shape[0], b.shape[1]))


def _fake_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor,
    masking: bool,
    output_mask: int,
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    wanted = mask_bits(output_mask, 3)
    return tuple(
        a.new_empty(s if w else (0,)) for s, w in zip((a.shape, b.shape, grad.shape), wanted, strict=True)
    )


for _op, _schema in SCHEMAS.items():
    define(_op, _schema)
_BUILT = torch._C._dispatch_has_kernel_for_dispatch_key(f"tensorcomp::{_NAME}", "CPU")
register_default(_NAME, _forward, _fake_forward)
register_default(f"{_NAME}_backward", _backward, _fake_backward)
register_autograd(_NAME, autograd_kernel)
register_mapped(_NAME, autograd_kernel)
fallthrough_autograd(f"{_NAME}_backward")
