"""What a network does with example inputs: which layers it calls, on what shapes, with how many MACs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from tensorcomp_ext.plan.examples import call_model
from tensorcomp_ext.plan.modes import evaluating


@dataclass(frozen=True)
class Call:
    """One call of a layer: the geometry of the input, enough to make another, and the output's shape."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    output_shape: tuple[int, ...]

    def input(self) -> torch.Tensor:
        """An input of ones with the recorded sizes, strides, dtype and device."""
        if 0 in self.stride:
            return torch.ones(self.shape, dtype=self.dtype, device=self.device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).fill_(1)


def dense_macs(layer: nn.Module, call: Call) -> int | None:
    """MACs of a torch.nn convolution, linear layer or embedding for one call; None for other layers.

    Convolution: outputs · (C_in / groups) · Πk. Transposed: inputs · (C_out / groups) · Πk. Linear: outputs ·
        in. An embedding only reads.
    """
    outputs = math.prod(call.output_shape)
    if isinstance(layer, _ConvTransposeNd):
        return math.prod(call.shape) * (layer.out_channels // layer.groups) * math.prod(layer.kernel_size)
    if isinstance(layer, _ConvNd):
        return outputs * (layer.in_channels // layer.groups) * math.prod(layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return outputs * layer.in_features
    if isinstance(layer, nn.Embedding):
        return 0
    return None


@contextmanager
def quiet(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no autograd, the random state put back afterwards."""
    devices = {p.device.index or 0 for model in models for p in model.parameters() if p.device.type == "cuda"}
    with evaluating(*models), torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
        yield


def trace(
    model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any
) -> tuple[Any, dict[str, list[Call]]]:
    """Run ``model`` once and return its output and the calls of each of ``layers`` (names to submodules).

    The network runs in evaluation mode without autograd, so neither its statistics nor the random state move;
    hooks that the user registered do fire. A layer that was not called has an empty list; those that were
    stand behind them, in the order of their last calls.
    """
    calls: dict[str, list[Call]] = {name: [] for name in layers}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module is not layers[name]:
                return  # a replaced layer shares its table of hooks with the layer that took its place
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, torch.Tensor) and isinstance(output, torch.Tensor):
                stride = tuple(x.stride()) if x.layout == torch.strided else ()
                made = calls.pop(name)
                calls[name] = [*made, Call(tuple(x.shape), stride, x.dtype, x.device, tuple(output.shape))]

        return record

    handles = [
        layer.register_forward_hook(recorder(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with quiet(model):
            output = call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return output, calls


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def output_distance(dense: Any, compressed: Any) -> float | None:
    """Relative L2 distance of two outputs (tensors, or trees of tensors); None where they hold no numbers.

    ValueError where the outputs have not the same number of tensors or the same shapes.
    """
    expected, got = [tuple(t.shape) for t in _tensors(dense)], [tuple(t.shape) for t in _tensors(compressed)]
    if expected != got:
        raise ValueError(
            f"compress: the compressed model returns tensors of shapes {got}, the dense one {expected}"
        )
    difference = norm = 0.0
    for before, after in zip(_tensors(dense), _tensors(compressed), strict=True):
        if before.is_floating_point():
            difference += float((after.double() - before.double()).square().sum())
            norm += float(before.double().square().sum())
    if norm == 0.0:
        return None
    return math.sqrt(difference / norm)
