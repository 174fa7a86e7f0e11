"""Put the tensors of a saved network into a model, after everything was compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tensorcomp_ext.compress.checkpoint import CheckpointError, Header
from tensorcomp_ext.compress.selection import PLAIN
from tensorcomp_ext.compress.swap import adopt, swapped
from tensorcomp_ext.nn import FactorizedLayer, from_config
from tensorcomp_ext.plan import PlannedLayer, import_choices
from tensorcomp_ext.plan.memory_format import applies_channels_last

GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "in_features",
    "out_features",
)


def load_into(model: nn.Module, header: Header, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Replace layers of ``model`` as ``header`` says and copy ``tensors`` (state name to tensor) into it.

    CheckpointError, with the model as it was, where the file is for another model.
    """
    _require_memory(model, path)
    modules = dict(model.named_modules(remove_duplicate=False))
    replacements: dict[str, nn.Module] = {}
    made: dict[int, nn.Module] = {}
    for name, config in header.layers.items():
        if name not in modules:
            raise CheckpointError(
                f"load: {path} has a factorised layer {name!r}, the model has no such module"
            )
        old: Any = modules[name]
        new = _build(name, config, tensors, path)
        _check_place(name, new, old, path)
        if isinstance(old, FactorizedLayer) and old.config() == new.config():
            continue
        if name == "":
            raise CheckpointError(
                f"load: {path} is one factorised layer; give load() that layer, not a dense one"
            )
        if id(old) not in made:  # a layer with two names stays one layer
            device = next(old.parameters()).device
            filled = new.to_empty(device=device)
            filled.load_state_dict({key: tensors[f"{name}.{key}"] for key in filled.state_dict()})
            factorized = isinstance(old, FactorizedLayer)
            filled.channels_last = old.channels_last if factorized else applies_channels_last(old.weight)
            made[id(old)] = adopt(filled, old)
        replacements[name] = made[id(old)]

    with _kept(model), swapped(model, replacements):
        _compare(model.state_dict(), tensors, path)
        try:
            import_choices(model, header.plans)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"load: {path}: its plans are not valid: {error}") from error
        _take_dtypes(model, tensors)
        model.load_state_dict(dict(tensors), strict=True)


def _require_memory(model: nn.Module, path: str) -> None:
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and not is_lazy(value) and value.is_meta:
            raise CheckpointError(
                f"load: {path}: {name!r} of the model is on the meta device, without memory to load into; "
                "give it some with model.to_empty(device=...)"
            )


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Put tensors, dtypes and plan choices back as they were if the block raises.

    What a load has begun to write may be cut off by the user's own hooks, so a copy of every tensor is held.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
    kept = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]
    layers = [module for module in model.modules() if isinstance(module, PlannedLayer)]
    choices = [(layer, layer.tuned, layer.prefer, layer.plan) for layer in layers]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, data, values in kept:
                if tensor.dtype != data.dtype:
                    tensor.data = data
                tensor.copy_(values)
        for layer, tuned, prefer, plan in choices:
            layer.tuned, layer.prefer, layer.plan = tuned, prefer, plan  # type: ignore[assignment]
        raise


def _build(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: str
) -> FactorizedLayer:
    """The layer a configuration describes, without memory, its shapes compared with the file's tensors."""
    try:
        with torch.device("meta"):
            new = from_config(dict(config))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"load: {path}: the configuration of layer {name!r} is not valid: {error}"
        ) from error
    for key, value in new.state_dict().items():
        full = f"{name}.{key}".lstrip(".")
        if full not in tensors:
            raise CheckpointError(f"load: {path}: tensor {full!r} of a factorised layer is missing")
        if tensors[full].shape != value.shape:
            raise CheckpointError(
                f"load: {path}: {full!r} must be {list(value.shape)} by its configuration, "
                f"got {list(tensors[full].shape)}"
            )
    wrong = new.weight.check_state(tensors, f"{name}.weight.".lstrip("."))
    if wrong is not None:
        raise CheckpointError(f"load: {path} is damaged: {wrong}")
    return new


def _check_place(name: str, new: nn.Module, old: nn.Module, path: str) -> None:
    """Compare a factorised layer with the layer of the model that it takes the place of."""
    kind, place = type(new).__name__, type(old).__name__
    if type(old) is not type(new) and (type(old) not in PLAIN or kind != f"Factorized{place}"):
        raise CheckpointError(f"load: {path} has {kind} as {name!r}, the model has {place} there")
    if getattr(old, "padding_mode", "zeros") != "zeros":
        raise CheckpointError(f"load: {path} has {kind} as {name!r}, the model's layer is padded otherwise")
    for attribute in GEOMETRY:
        expected, got = getattr(old, attribute, None), getattr(new, attribute, None)
        if expected != got:
            raise CheckpointError(
                f"load: {path} is for another model: layer {name!r} has {attribute} {got}, "
                f"the model's has {expected}"
            )
    if (new._parameters.get("bias") is None) != (old._parameters.get("bias") is None):
        raise CheckpointError(
            f"load: {path} is for another model: only one of the layers {name!r} has a bias"
        )


def _compare(state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: str) -> None:
    missing, unexpected = sorted(set(state) - set(tensors)), sorted(set(tensors) - set(state))
    if missing or unexpected:
        parts = [
            f"{what} {_some(names)}" for what, names in (("lacks", missing), ("has too", unexpected)) if names
        ]
        raise CheckpointError(f"load: {path} is for another model: it {' and '.join(parts)}")
    for name, value in state.items():
        tensor = tensors[name]
        if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(
                f"load: {path} is for another model: {name!r} is {list(tensor.shape)} in the file, "
                f"{shape} in the model"
            )
        if value.dtype != tensor.dtype and not (value.is_floating_point() and tensor.is_floating_point()):
            raise CheckpointError(
                f"load: {path}: {name!r} is {tensor.dtype} in the file, {value.dtype} in the model"
            )


def _take_dtypes(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give parameters and buffers the dtype of the file: what was saved in bfloat16 comes back in it."""
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        stored = tensors.get(name)
        if stored is not None and stored.dtype != tensor.dtype:
            tensor.data = tensor.data.to(stored.dtype)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
