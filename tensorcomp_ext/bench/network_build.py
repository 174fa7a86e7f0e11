"""The networks of the suite: dense, compressed, folded, and in stages of the library or of tltorch."""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .. import models
from ..nn import FactorizedConv2d, FactorizedLayer, FactorizedLinear
from .network_schemes import BLOCK, MLP, Target, get_scheme

TOKENS = 197


def build(name: str, scheme: str) -> nn.Module:
    """The dense network with fresh weights.

    The tensor-ring papers have 1x1 convolutions as shortcuts of their CIFAR ResNets; elsewhere they are
    without parameters.
    """
    if name == BLOCK:
        return models.ViTBlock()
    if name == MLP:
        return models.GatedMLP()
    ring = name.startswith("resnet") and scheme.startswith("tr1")
    options: dict[str, Any] = {"option": "B"} if ring else {}
    return models.build(name, num_classes=1000 if models.image_size(name) == 224 else 10, **options)


def inputs(name: str, batch: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random images (or tokens) of the network's size, channels-last."""
    generator = torch.Generator().manual_seed(batch)
    if name == MLP:
        return torch.randn(batch, 4096, generator=generator).to(device, dtype)
    if name == BLOCK:
        return torch.randn(batch, TOKENS, 384, generator=generator).to(device, dtype)
    size = models.image_size(name)
    x = torch.randn(batch, models.image_channels(name), size, size, generator=generator)
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=2)
def networks(name: str, scheme: str, rank: float) -> tuple[nn.Module, nn.Module]:
    """The dense network with random weights, and one of random factors in its place; float32 on the CPU.

    Each is compared with its own answer in float64, so that nothing need be decomposed. Batch normalisation
    has the statistics of one random batch, so that values stay of unit scale.
    """
    # Under inference mode the weights would be inference tensors, which no layer can prepare once.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = build(name, scheme)
        compressed = copy.deepcopy(dense)
        choose = get_scheme(name, scheme, rank)
        for layer_name, layer in dense.named_modules():
            target = choose(layer_name, layer)
            if target is not None:
                compressed.set_submodule(layer_name, like(layer, target))
        for network in (dense, compressed):
            _calibrate(network, inputs(name, 4, torch.float32, "cpu"))
        return dense, compressed


@torch.no_grad()
def _calibrate(network: nn.Module, x: Tensor) -> None:
    """Give batch normalisation, where there is any, the statistics of ``x``; evaluation mode after it."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 1.0
    if norms:
        network.train()(x)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    network.eval()


def like(layer: nn.Module, target: Target) -> FactorizedLayer:
    """A factorized layer of random factors in the place of a dense one."""
    shared: dict[str, Any] = {"format": target.format, "rank": target.rank, **target.options}
    if isinstance(layer, nn.Linear):
        return FactorizedLinear(layer.in_features, layer.out_features, layer.bias is not None, **shared)
    assert isinstance(layer, nn.Conv2d)
    window = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    bias = layer.bias is not None
    return FactorizedConv2d(layer.in_channels, layer.out_channels, *window, bias=bias, **shared)


def parameters(model: nn.Module) -> int:
    """Entries of all parameters."""
    return sum(p.numel() for p in model.parameters())


def folded(model: nn.Module) -> nn.Module:
    """A copy with batch normalisation folded into the convolutions before it, by ``torch.nn.utils.fusion``.

    Networks that torch.fx cannot trace are folded where convolution and normalisation follow one another in
    an ``nn.Sequential``.

    Raises:
        ValueError: the network has no batch normalisation.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise ValueError("no batch normalisation to fold")
    from torch.fx.experimental import optimization

    model = copy.deepcopy(model).eval()
    try:
        return optimization.fuse(model, inplace=True)
    except (TypeError, torch.fx.proxy.TraceError):
        for module in model.modules():
            if isinstance(module, nn.Sequential):
                _fold_neighbours(module)
        return model


def _fold_neighbours(sequence: nn.Sequential) -> None:
    for index in range(len(sequence) - 1):
        first, second = sequence[index], sequence[index + 1]
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
            sequence[index] = fuse_conv_bn_eval(first, second)
            sequence[index + 1] = nn.Identity()


def staged(model: nn.Module) -> nn.Module:
    """A copy in which every factorized layer is the sequence of torch's layers it stands for."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FactorizedLayer):
            model.set_submodule(name, layer.to_sequential())
    return model


def with_tltorch(model: nn.Module) -> nn.Module:
    """A copy in which every Tucker-2 convolution is tltorch's, contracted by its own factorized route.

    Raises:
        ValueError: tltorch is not installed, or has no such format for such layers.
    """
    if importlib.util.find_spec("tltorch") is None:
        raise ValueError("tltorch (tensorly-torch) is not installed")
    import tensorly

    tensorly.set_backend("pytorch")
    tensorly.plugins.use_opt_einsum("optimal")
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FactorizedLayer):
            model.set_submodule(name, _tltorch_layer(layer))
    return model


def _tltorch_layer(layer: FactorizedLayer) -> nn.Module:
    import tltorch

    if not isinstance(layer, FactorizedConv2d) or layer.format != "tucker2":
        raise ValueError(f"tltorch: no comparison for {layer.format} in {type(layer).__name__}")
    core, factor_out, factor_in = (f.detach() for f in layer.weight.factors)
    kernel = tuple(core.shape[2:])
    made = tltorch.FactorizedConv(
        layer.in_channels,
        layer.out_channels,
        kernel,
        order=2,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=layer.bias is not None,
        factorization="tucker",
        rank=tuple(core.shape),
        implementation="factorized",
    )
    eyes = [torch.eye(n, dtype=core.dtype) for n in kernel]
    with torch.no_grad():
        made.weight.core.copy_(core)
        for factor, value in zip(made.weight.factors, (factor_out, factor_in, *eyes), strict=True):
            factor.copy_(value)
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
    return made.to(core.dtype)
