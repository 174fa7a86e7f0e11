"""Which layers compression may touch, and why it leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.nn.embedding import dense_refusal

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, nn.EmbeddingBag)
_LISTED = (_ConvNd, nn.Linear, nn.Embedding, nn.EmbeddingBag, FactorizedLayer)
WHOLE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules with weights of their own that only their own kernels read: listed, never replaced."""
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a quantised convolution, linear layer or embedding of torch."""
    kind = type(module)
    return kind.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized")) and (
        any(hasattr(module, size) for size in ("in_features", "in_channels", "num_embeddings"))
    )


def considered(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers a report lists: convolutions, linear layers and embeddings, under every name they have.

    So are recurrent layers and the input projections of nn.MultiheadAttention, so that no report passes over
    weights that stay dense in silence.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (*_LISTED, *WHOLE)) or is_quantized(module):
            yield name, module


def weight_numel(module: nn.Module) -> int:
    """Entries stored for the weights of a layer, dense or factorised; 0 where that cannot be told."""
    if isinstance(module, WHOLE):
        return sum(p.numel() for key, p in module.named_parameters(recurse=False) if "weight" in key)
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return 0
    if isinstance(weight, torch.Tensor):
        return weight.numel()
    if isinstance(weight, nn.Module):
        return sum(parameter.numel() for parameter in weight.parameters())
    return 0


class Uses:
    """Who owns each weight of a network: finds modules with two names and parameters with two owners."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._module_names: dict[int, list[str]] = {}
        self._owners: dict[tuple[Any, ...], list[str]] = {}
        for name, module in self.modules.items():
            names = self._module_names.setdefault(id(module), [])
            names.append(name)
            if len(names) > 1:
                continue
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners.setdefault(_identity(parameter), []).append(f"{name}.{key}".lstrip("."))

    def other_names(self, name: str) -> list[str]:
        """The further names of the module called ``name``."""
        return [other for other in self._module_names[id(self.modules[name])] if other != name]

    def other_owners(self, name: str) -> list[str]:
        """The further parameters that are the weight of the module called ``name``."""
        weight = self.modules[name]._parameters.get("weight")
        if weight is None:
            return []
        own = f"{name}.weight".lstrip(".")
        return [owner for owner in self._owners.get(_identity(weight), []) if owner != own]

    def reader(self, name: str) -> str | None:
        """The enclosing module known to read the weight of ``name`` instead of calling the layer, or None."""
        path, _, child = name.rpartition(".")
        parent = self.modules.get(path) if child else None
        if isinstance(parent, nn.MultiheadAttention) and child == "out_proj":
            return "nn.MultiheadAttention"
        if isinstance(parent, nn.TransformerEncoderLayer) and child in ("linear1", "linear2"):
            return "the fast path of nn.TransformerEncoderLayer"
        return None


def _identity(parameter: torch.Tensor) -> tuple[Any, ...]:
    """Equal for parameters that share memory from their first entry on."""
    if isinstance(parameter, nn.parameter.UninitializedParameter) or type(parameter.data) is not torch.Tensor:
        return (id(parameter),)
    if parameter.layout != torch.strided or parameter.is_meta or parameter.numel() == 0:
        return (id(parameter),)
    return (str(parameter.device), parameter.data_ptr())


def refusal(name: str, module: nn.Module, uses: Uses, groups: bool = False) -> str | None:
    """Why the layer cannot be replaced without risk to the results, or None where it can.

    ``groups``: whether its format takes grouped convolutions.
    """
    kind = type(module)
    if isinstance(module, FactorizedLayer):
        return "already factorised"
    if is_quantized(module):
        return "quantised"
    if isinstance(module, nn.MultiheadAttention):
        return "input projections of nn.MultiheadAttention, which reads their weights itself"
    if isinstance(module, WHOLE):
        return f"recurrent: nn.{kind.__name__} takes its weights dense"
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "lazy: its weight has no shape before the first call"
    reader = uses.reader(name)
    if reader is not None:
        return f"its weight is read by {reader}"
    if parametrize.is_parametrized(module):
        return "parametrized: its weight is computed from other parameters"
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolution"
    if kind not in PLAIN or "forward" in module.__dict__:
        return (
            f"{kind.__name__} may compute in its own way"
            if kind not in PLAIN
            else "its forward is overridden"
        )
    return (
        _state_refusal(module)
        or _geometry_refusal(module, groups)
        or _sharing_refusal(name, uses)
        or (dense_refusal(module) if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None)
    )


def _state_refusal(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    extra = [
        key
        for key in (*module._parameters, *module._buffers, *module._modules)
        if key not in ("weight", "bias")
    ]
    if weight is None or extra:
        return "its weight is computed from other tensors (weight_norm, spectral_norm, pruning …)" + (
            f": {', '.join(extra)}" if extra else ""
        )
    if type(weight.data) is not torch.Tensor or weight.layout != torch.strided:
        return f"its weight is a {type(weight.data).__name__} of layout {weight.layout}, not a plain tensor"
    if weight.dtype not in FLOATING:
        return f"its weight has dtype {weight.dtype}"
    if weight.is_meta:
        return "its weight is on the meta device, without values"
    if module._state_dict_hooks or module._load_state_dict_pre_hooks:
        return "it has state-dict hooks of its own"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def _geometry_refusal(module: nn.Module, groups: bool) -> str | None:
    if not isinstance(module, _ConvNd):
        return None
    if module.groups > 1 and not groups:
        depthwise = module.groups == module.in_channels
        return "depthwise convolution" if depthwise else f"grouped convolution ({module.groups} groups)"
    if module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode!r}"
    return None


def _sharing_refusal(name: str, uses: Uses) -> str | None:
    names = uses.other_names(name)
    if names:
        return f"the same module is also {', '.join(names)}"
    owners = uses.other_owners(name)
    return f"its weight is shared with {', '.join(owners)}" if owners else None


def as_patterns(patterns: str | Iterable[str], argument: str) -> tuple[str, ...]:
    """One pattern or several, as a tuple. TypeError for anything that is not text."""
    if not isinstance(patterns, Iterable):
        raise TypeError(f"compress: {argument} must be a name pattern or several, got {patterns!r}")
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(f"compress: {argument} must hold name patterns, got {pattern!r}")
    return found


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the shell-style patterns matches the whole name (``*`` crosses dots)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def require_matches(patterns: Iterable[str], names: Sequence[str], argument: str) -> None:
    """ValueError naming the first pattern that matches no layer: no misspelling passes in silence."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            inside = [name for name in names if name.startswith(f"{pattern}.")]
            hint = f"; for the layers inside it write '{pattern}.*'" if inside else ""
            raise ValueError(
                f"compress: {argument} pattern {pattern!r} matches no convolution, "
                f"linear layer or embedding by its name{hint}"
                + (f". Layers: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if not hint else "")
            )


def format_and_options(value: Any) -> tuple[str | None, dict[str, Any]]:
    """A format as ``compress`` takes it, a name or a name with options, as both. TypeError for others."""
    if value is None or isinstance(value, str):
        return value, {}
    if (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], Mapping)
    ):
        return value[0], dict(value[1])
    raise TypeError(f"compress: format must be a name, (name, options) or a mapping to these, got {value!r}")


def by_name(mapping: Mapping[Any, Any], name: str, module: nn.Module) -> Any:
    """The value of the first key that fits, a name pattern or a layer type; "*" comes last. Else None."""
    for key, value in mapping.items():
        if isinstance(key, str) and key != "*" and fnmatchcase(name, key):
            return value
        if isinstance(key, type) and isinstance(module, key):
            return value
    return mapping.get("*")
