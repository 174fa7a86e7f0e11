"""Exchange layers inside a network, all or none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tensorcomp_ext.compress.selection import PLAIN

# Instance state of a torch.nn.Module that follows the layer's place in the network, not its weights. The very
# dictionaries are handed on, so that a RemovableHandle given out before the exchange still removes its hook.
HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def adopt(new: nn.Module, old: nn.Module) -> nn.Module:
    """Make ``new`` take the place of ``old``: mode, hooks, trainability and the bias Parameter itself.

    The bias keeps its identity (optimizers and ties that hold it stay valid) unless its dtype differs.
    Returns ``new``; ``old`` is not changed.
    """
    new.train(old.training)
    for table in HOOK_TABLES:
        if table in old.__dict__:
            setattr(new, table, old.__dict__[table])
    for attribute in old.__dict__.keys() - _fresh_attributes(type(old)) - new.__dict__.keys():
        setattr(new, attribute, old.__dict__[attribute])  # what the user wrote on the layer
    bias, weight = old._parameters.get("bias"), old._parameters.get("weight")
    new_bias = new._parameters.get("bias")
    if bias is not None and new_bias is not None:
        if new_bias.dtype == bias.dtype:
            new._parameters["bias"] = bias
        else:
            new_bias.requires_grad_(bias.requires_grad)
    factors = new._modules.get("weight")
    if weight is not None and factors is not None:
        for parameter in factors.parameters():
            parameter.requires_grad_(weight.requires_grad)
    return new


def _fresh_attributes(kind: type[nn.Module]) -> frozenset[str]:
    if kind not in PLAIN:
        return frozenset(HOOK_TABLES)
    make: Callable[..., nn.Module] = kind
    sizes = (1, 1, 1) if issubclass(kind, _ConvNd) else (1, 1)
    return frozenset(make(*sizes, device="meta").__dict__)


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the submodule ``name``, and the name under which it holds it."""
    path, _, child = name.rpartition(".")
    return (model.get_submodule(path) if path else model), child


def swap(model: nn.Module, replacements: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put every replacement at its name and return the former modules; undone whole on any error."""
    former: dict[str, nn.Module] = {}
    try:
        for name, new in replacements.items():
            parent, child = parent_of(model, name)
            former[name] = parent.get_submodule(child)
            setattr(parent, child, new)
    except BaseException:
        restore(model, former)
        raise
    return former


def restore(model: nn.Module, former: Mapping[str, nn.Module]) -> None:
    """Undo ``swap``."""
    for name, old in former.items():
        parent, child = parent_of(model, name)
        parent._modules[child] = old


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Swap; keep the exchange if the block ends well and undo it if it raises."""
    former = swap(model, replacements)
    try:
        yield
    except BaseException:
        restore(model, former)
        raise


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``; ValueError where it cannot be made."""
    try:
        return copy.deepcopy(model, _computed_tensors(model))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"compress: the model cannot be copied ({error}); inplace=True needs no copy"
        ) from error


def _computed_tensors(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy with the tensors it refuses: weights that hooks compute at every call, caches."""
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in module.__dict__.values()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    }
