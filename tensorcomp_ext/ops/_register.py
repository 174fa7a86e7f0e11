"""What every op's registration shares: schema, default and fake kernels, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._transforms import transformed

_LIBRARY = torch.library.Library("tensorcomp", "FRAGMENT")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def define(name: str, schema: str) -> None:
    """Define ``tensorcomp::name`` unless the native library has brought it already.

    A library that has brought it with other arguments is of other sources: native code is then switched off.
    """
    if not hasattr(torch.ops.tensorcomp, name):
        _LIBRARY.define(name + schema)
    elif str(getattr(torch.ops.tensorcomp, name).default._schema) != _normalized(name, schema):
        _native.outdated(name)


def _normalized(name: str, schema: str) -> str:
    """The schema as torch writes it."""
    return str(torch._C.parse_schema(f"tensorcomp::{name}{schema}"))


def register_default(name: str, kernel: Callable[..., Any], fake: Callable[..., Any] | None) -> None:
    """Register the kernel that serves every device without one of its own, and the shape function.

    The kernel is also reachable as ``tensorcomp::name_reference``: native code calls that for dtypes it
    cannot take.
    """
    schema = str(getattr(torch.ops.tensorcomp, name).default._schema)
    define(f"{name}_reference", schema[schema.index("(") :])
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{name}_reference", kernel, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"tensorcomp::{name}", fake, lib=_LIBRARY)


def register_composite(name: str, kernel: Callable[..., Any]) -> None:
    """Register an op that is made of others: what differentiates, maps or traces it sees those."""
    for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        _LIBRARY.impl(name, kernel, key)


def register_autograd(name: str, kernel: Callable[..., Any]) -> None:
    """Register what the dispatcher calls for tensors of autograd, on every device."""
    _LIBRARY.impl(name, kernel, "Autograd")


def register_mapped(name: str, kernel: Callable[..., Any]) -> None:
    """Register what ``torch.vmap`` sees; for ops with lists of tensors, which have no fallback there."""
    _LIBRARY.impl(name, kernel, "FuncTorchBatchedDecomposition")


def fallthrough_autograd(name: str) -> None:
    """For inference-only ops: skip torch's generic autograd wrapper, which costs a microsecond a call."""
    for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, key)


def refuse_transforms(name: str, instead: str) -> None:
    """For inference-only ops that data flows through: an error where derivatives would be lost in silence.

    Reached by every call that has tensors of autograd and is not made below it; so package code makes its
    calls there.
    """
    op = getattr(torch.ops.tensorcomp, name).default

    def kernel(*args: Any) -> Any:
        if transformed():
            raise RuntimeError(
                f"{name}: for inference only; under function transforms and forward-mode AD use {instead}"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    register_autograd(name, kernel)


def _lowered(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return [_lowered(v, dtype) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def register_autocast(name: str, tensors: int) -> None:
    """Under autocast, cast the first ``tensors`` arguments to the autocast dtype, as convolutions are.

    An argument may be a list of tensors.
    """
    op = getattr(torch.ops.tensorcomp, name).default
    for device, key in _AUTOCAST_KEYS.items():

        def cast(*args: Any, _device: str = device, _key: str = key, **options: Any) -> Any:
            dtype = torch.get_autocast_dtype(_device)
            low = [_lowered(a, dtype) for a in args[:tensors]]
            with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
            ):
                return op(*low, *args[tensors:], **options)

        _LIBRARY.impl(name, cast, key)
