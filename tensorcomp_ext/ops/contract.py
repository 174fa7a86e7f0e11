"""A network of cores contracted pair by pair, in one call forward and one backward.

CPU float32 is served by ``csrc/ops/contract.cpp`` where it is built. Elsewhere the oracle serves, an einsum
for each pair; :func:`native_support` says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _native, reference
from .._native import Support
from ._contract_autograd import SCHEMAS, autograd_kernel, gradients, native_contract, oracle
from ._contract_program import PairProgram, decode, fault, sizes_of
from ._oracle_gradients import mask_bits
from ._register import (
    fallthrough_autograd,
    register_autocast,
    register_autograd,
    register_default,
    register_mapped,
)
from ._transforms import transformed

__all__ = ["PairProgram", "contract", "native_contract", "native_support", "served_plainly"]

_NAME = "contract"
_OPS = torch.ops.tensorcomp
_PLAIN = frozenset((Tensor, Parameter))
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch.is_autocast_enabled
_tracing = torch._C._get_tracing_state


def native_support(cores: Sequence[Tensor]) -> Support:
    """Whether a native kernel takes these cores, and the reason when it does not."""
    device, dtype = cores[0].device.type, cores[0].dtype
    if device != "cpu":
        return Support(False, f"there is no native {_NAME} for device {device!r}")
    loaded = _native.status()
    if loaded.ok and not _BUILT:
        return Support(False, f"the native library has no {_NAME}")
    if loaded.ok and dtype != torch.float32:
        return Support(False, f"the native CPU kernel takes float32, not {dtype}")
    return loaded


def served_plainly(cores: Sequence[Tensor]) -> bool:
    """Whether :func:`native_contract` serves cores of a sound program: nothing traces or casts this call."""
    if (
        not _BUILT
        or _is_compiling()
        or _tracing() is not None
        or transformed()
        or _is_autocast_enabled("cpu")
    ):
        return False
    for core in cores:
        if type(core) not in _PLAIN or core.dtype is not torch.float32 or not core.is_cpu:
            return False
    return True


def contract(cores: Sequence[Tensor], program: PairProgram, *, backend: str | None = None) -> Tensor:
    """The product of all cores, summed over every label that two of them share.

    Pair by pair ``C[a.., b..] = sum_k A[a.., k..] B[b.., k..]``. Forward keeps the product of every pair for
    backward. The kernel orders their modes so that little has to be moved, and uses several threads where
    that pays. Labels of more than two cores, or shared ones that the result has, make no such program (the
    rank of CP). Inside ``torch.func`` transforms and forward-mode differentiation the reference computes,
    from torch operations.

    Args:
        cores: tensors of one dtype and device, any strides; modes of one label have one size.
        program: the labels of their modes, those of the result, and the pairs in order.
        backend: None chooses; "native" or "reference" force.

    Returns:
        A tensor with the modes of ``program.result``, contiguous.

    Cost: for each pair the product of the sizes of all its labels, in MACs; twice that for the gradients.

    Raises:
        ValueError: shapes or devices that do not fit, no such program; ``backend="native"`` where it cannot
            serve (with the reason).
        TypeError: a core that is no tensor, or dtypes that differ.

    Source: Pfeifer et al. 2014 (networks contracted by a sequence of pairs).
    """
    sizes = check_arguments(cores, program)
    numbers = program.encode()
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{_NAME}: backend must be None, 'native' or 'reference', got {backend!r}")
    if backend != "reference":
        support = native_support(cores)
        if support.ok and not transformed():
            if _is_compiling() or _is_autocast_enabled("cpu"):
                result: Tensor = _OPS.contract.default(list(cores), numbers)[0]
                return result
            return native_contract(cores, numbers, [sizes[label] for label in program.result])
        if backend == "native":
            reason = support.reason or "function transforms and forward-mode AD go to the reference"
            raise ValueError(f"{_NAME}: backend='native' cannot serve: {reason}")
    return reference.contract(cores, *program)[-1].contiguous()


def check_arguments(cores: Sequence[Tensor], program: PairProgram) -> Mapping[int, int]:
    """The size of each label.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.
    """
    if reason := fault(program):
        raise ValueError(f"{_NAME}: program: {reason}")
    return check_cores(cores, program)


def check_cores(cores: Sequence[Tensor], program: PairProgram) -> Mapping[int, int]:
    """As :func:`check_arguments` for a sound program."""
    if not isinstance(cores, (list, tuple)):
        raise TypeError(f"{_NAME}: cores must be a list of tensors, got {type(cores).__name__}")
    for place, core in enumerate(cores):
        if not isinstance(core, Tensor):
            raise TypeError(f"{_NAME}: cores[{place}] must be a tensor, got {type(core).__name__}")
    sizes = sizes_of(program, [core.shape for core in cores])
    dtype, device = cores[0].dtype, cores[0].device
    if not dtype.is_floating_point:
        raise TypeError(f"{_NAME}: cores must be of a floating dtype, got {dtype}")
    for place, core in enumerate(cores):
        if core.dtype != dtype:
            raise TypeError(
                f"{_NAME}: cores[{place}] must have the dtype of the first {dtype}, got {core.dtype}"
            )
        if core.device != device:
            raise ValueError(
                f"{_NAME}: cores[{place}] must be on the first one's device {device}, got {core.device}"
            )
    return sizes


# --- registration ---


def _forward(cores: Sequence[Tensor], program: Sequence[int]) -> tuple[Tensor, Tensor]:
    check_cores(cores, decode(program))
    result, saved = oracle(cores, program)
    return result.contiguous(), saved


def _backward(
    grad: Tensor, cores: Sequence[Tensor], saved: Tensor, program: Sequence[int], output_mask: int
) -> list[Tensor]:
    check_cores(cores, decode(program))
    found = gradients(grad, cores, program, mask_bits(output_mask, len(cores)), create_graph=False)
    return [grad.new_empty(0) if g is None else g.contiguous() for g in found]


def _fake_forward(cores: Sequence[Tensor], program: Sequence[int]) -> tuple[Tensor, Tensor]:
    decoded = decode(program)
    sizes = check_cores(cores, decoded)
    *between, _ = decoded.products()
    saved = sum(math.prod(sizes[label] for label in group) for group in between)
    return cores[0].new_empty([sizes[label] for label in decoded.result]), cores[0].new_empty(saved)


def _fake_backward(
    grad: Tensor, cores: Sequence[Tensor], saved: Tensor, program: Sequence[int], output_mask: int
) -> list[Tensor]:
    wanted = mask_bits(output_mask, len(cores))
    return [core.new_empty(core.shape if w else (0,)) for core, w in zip(cores, wanted, strict=True)]


assert set(SCHEMAS) == {_NAME, f"{_NAME}_backward"}
# The library is loaded by now: whether it brought the op.
_BUILT = _native.status().ok and torch._C._dispatch_has_kernel_for_dispatch_key(f"tensorcomp::{_NAME}", "CPU")
register_default(_NAME, _forward, _fake_forward)
register_default(f"{_NAME}_backward", _backward, _fake_backward)
register_autograd(_NAME, autograd_kernel)
register_mapped(_NAME, autograd_kernel)
register_autocast(_NAME, tensors=1)
fallthrough_autograd(f"{_NAME}_backward")
