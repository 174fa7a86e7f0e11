"""Folds in a traced network: which nodes go into the layer before them, and the exchange."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from tensorcomp_ext.compress.fold_weights import (
    CannotScale,
    affine,
    difference,
    folded_bias,
    scaled,
    tolerance,
)
from tensorcomp_ext.compress.swap import HOOK_TABLES, swap
from tensorcomp_ext.nn import FactorizedLayer, FoldedLayer, fold_layer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FOLDABLE = ("conv", "linear")
_RELUS = {F.relu, torch.relu, torch.relu_, F.relu_}
_ADDS = {operator.add, operator.iadd, torch.add}
_IN_PLACE_FUNCTIONS = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}


class Finding(NamedTuple):
    """One layer, and what was done with it or why nothing was."""

    name: str
    text: str


class Folder:
    """Folds one traced network in place; what it did is in ``folded``, what it left in ``left``.

    Args:
        prefix: of the names in the findings.
        output_dims: for linear layers, by identity, the numbers of dims their outputs were seen to have.
    """

    def __init__(self, traced: fx.GraphModule, prefix: str, output_dims: Mapping[int, set[int]]) -> None:
        self.traced, self.prefix, self.output_dims = traced, prefix, output_dims
        self.modules = dict(traced.named_modules(remove_duplicate=False))
        self.calls = Counter(id(self.modules[str(n.target)]) for n in self._calls())
        self.layers: set[fx.Node] = set()
        self.folded: list[Finding] = []
        self.left: list[Finding] = []

    def run(self) -> bool:
        """Fold what can be folded; whether anything was."""
        nodes = [(node, self.modules[str(node.target)]) for node in self._calls()]
        layers = [node for node, m in nodes if _foldable(m)]
        dense = [node for node, m in nodes if type(m) in (*_CONVOLUTIONS, nn.Linear)]
        self.layers = set(layers)
        done: dict[fx.Node, list[str]] = {}
        for node in [*layers, *dense]:
            done[node] = self._fold_norm(node)
        # Only now: of the two layers of a sum the later one takes the other's normalized output.
        for node in layers:
            done[node] += self._fold_store(node)
        for node, _ in nodes:
            if done.get(node):
                self.folded.append(Finding(self.prefix + str(node.target), ", ".join(done[node])))
        if self.folded:
            for node in self.traced.graph.nodes:
                node.type = None  # annotations written as strings cannot be pickled
            self.traced.delete_all_unused_submodules()
            self.traced.graph.lint()
            self.traced.recompile()
        return bool(self.folded)

    # --- batch normalization -------------------------------------------------------------------------------

    def _fold_norm(self, node: fx.Node) -> list[str]:
        norm_node = _only_user(node)
        norm = self._module(norm_node)
        if norm_node is None or not isinstance(norm, _BatchNorm) or norm_node.all_input_nodes != [node]:
            return []
        module = self.modules[str(node.target)]
        reason = self._exclusive(module) or self._exclusive(norm) or self._unfit(module, norm)
        made: nn.Module | None = None
        if not reason:
            try:
                made = _with_norm(module, norm)
            except CannotScale as error:
                reason = str(error)
        if made is not None:
            x = _example(module)
            found = _without_gradients(made, x)
            expected = _without_gradients(norm, _without_gradients(module, x))
            off = difference(found, expected)
            if not off <= tolerance(expected.dtype):
                reason = f"with the batch normalization its outputs differ by {off:.1e}"
        if made is None or reason:
            self.left.append(Finding(self.prefix + str(node.target), reason))
            return []
        self._exchange(node, made)
        norm_node.replace_all_uses_with(node)
        self.traced.graph.erase_node(norm_node)
        return ["batch normalization" + _became(module, made)]

    def _unfit(self, module: nn.Module, norm: _BatchNorm) -> str:
        """Why a normalization cannot go into the layer, whatever its format; empty where it may."""
        if norm.running_mean is None or norm.running_var is None:
            return "the batch normalization keeps no running statistics"
        weight: Any = module.weight
        outputs = weight.shape[0]
        if len(norm.running_mean) != outputs:
            return f"the batch normalization is over {len(norm.running_mean)} channels, not {outputs}"
        if isinstance(module, _CONVOLUTIONS) or (
            isinstance(module, FactorizedLayer) and module.kind == "conv"
        ):
            return ""
        # Of outputs [N, L, F] it normalizes along L.
        dims = self.output_dims.get(id(module))
        if dims is None:
            return "whether its outputs have two dims only example_inputs can tell"
        return "" if dims == {2} else f"its outputs have {sorted(dims)} dims, the second one is normalized"

    # --- addition and rectification ------------------------------------------------------------------------

    def _fold_store(self, node: fx.Node) -> list[str]:
        layer = self.modules[str(node.target)]
        assert isinstance(layer, FactorizedLayer)
        user = _only_user(node)
        residual = self._residual(node, user)
        last = user if residual is None else _only_user(user)
        relu = last if last is not None and self._is_relu(last) else None
        if (residual is None and relu is None) or self._exclusive(layer):
            return []
        made = fold_layer(layer, relu=relu is not None)
        x = _example(layer)
        plain = _without_gradients(layer, x)
        second = None if residual is None else _random(plain.shape).to(plain)
        expected = plain if second is None else plain + second
        off = difference(_without_gradients(made, x, second), F.relu(expected) if relu else expected)
        if not off <= tolerance(expected.dtype):
            reason = f"with what follows it its outputs differ by {off:.1e}"
            self.left.append(Finding(self.prefix + str(node.target), reason))
            return []
        self._exchange(node, made)
        if residual is not None:
            assert user is not None
            if self._later(residual, node):
                user.prepend(node)
            x_node = node.args[0] if node.args else node.kwargs["input"]
            node.args, node.kwargs = (x_node, residual), {}
        for gone in (relu, None if residual is None else user):
            if gone is not None:
                gone.replace_all_uses_with(node, delete_user_cb=lambda u: u is not node)
                self.traced.graph.erase_node(gone)
        return ["residual"] * (residual is not None) + ["ReLU"] * (relu is not None)

    def _residual(self, node: fx.Node, add: fx.Node | None) -> fx.Node | None:
        """What ``add`` adds to the layer's output, if that is all it does and the layer may run that late."""
        if add is None or len(add.args) != 2 or add.kwargs:
            return None
        if not (
            (add.op == "call_function" and add.target in _ADDS)
            or (add.op == "call_method" and add.target in ("add", "add_"))
        ):
            return None
        first, second = add.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return None
        other = second if first is node else first
        if _in_place(add) and first is not node:
            return None  # the sum is to be seen in the residual
        if other in self.layers and len(other.users) == 1 and self._later(other, node):
            return None  # of two layers the later one takes the other's output
        place = node.next
        while place is not add:
            if _in_place(place) or self._in_place_module(place):
                return None  # it might write the layer's input, or the residual, which now meet elsewhere
            place = place.next
        return other

    def _later(self, node: fx.Node, than: fx.Node) -> bool:
        order = {n: i for i, n in enumerate(self.traced.graph.nodes)}
        return order[node] > order[than]

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _RELUS
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        module = self._module(node)
        return type(module) is nn.ReLU and not hooked(module)

    # --- the graph -----------------------------------------------------------------------------------------

    def _calls(self) -> list[fx.Node]:
        return [n for n in self.traced.graph.nodes if n.op == "call_module"]

    def _module(self, node: fx.Node | None) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node is not None and node.op == "call_module" else None

    def _in_place_module(self, node: fx.Node) -> bool:
        return bool(getattr(self._module(node), "inplace", False))

    def _exclusive(self, module: nn.Module) -> str:
        """Why a module must stay as it is; empty where it need not."""
        if self.calls[id(module)] > 1:
            return f"the {type(module).__name__} is called {self.calls[id(module)]} times"
        if hooked(module):
            return f"the {type(module).__name__} has hooks"
        return ""

    def _exchange(self, node: fx.Node, made: nn.Module) -> None:
        target = str(node.target)
        swap(self.traced, {target: made})
        self.modules[target] = made
        self.calls[id(made)] = 1


def _foldable(module: nn.Module) -> bool:
    """Whether it is a factorized layer into which nothing has been folded yet."""
    return (
        isinstance(module, FactorizedLayer)
        and not isinstance(module, FoldedLayer)
        and module.kind in _FOLDABLE
    )


def _only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        marked = name.endswith("_") and not name.endswith("__")
        asked = bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        return marked or asked or node.target in _IN_PLACE_FUNCTIONS
    return False


def hooked(module: nn.Module) -> bool:
    """Whether anything is registered that a call of the module runs, and a call of its parts would not."""
    return any(getattr(module, table, None) for table in HOOK_TABLES)


def _became(module: nn.Module, made: nn.Module) -> str:
    """A change of the stored weights in words; empty where there is none."""
    if not isinstance(module, FactorizedLayer) or not isinstance(made, FactorizedLayer):
        return ""
    before, after = module.weight, made.weight
    if (before.name, before.numel) == (after.name, after.numel):
        return ""
    return f" (from {before.name} to {after.name}, {before.numel:,} to {after.numel:,} weights)"


def _with_norm(module: nn.Module, norm: _BatchNorm) -> nn.Module:
    """``module`` and the normalization after it as one layer.

    Raises:
        CannotScale: with the reason.
    """
    if isinstance(module, FactorizedLayer):
        scale, shift = affine(norm)
        weight = scaled(module.weight, scale)
        bias = folded_bias(module.bias, scale, shift, module.weight.factors[0].dtype)
        return fold_layer(module, weight=weight, bias=bias)
    if isinstance(module, nn.Linear):
        return fuse_linear_bn_eval(module, norm)
    return fuse_conv_bn_eval(module, norm)  # type: ignore[type-var]


def _without_gradients(module: nn.Module, *inputs: Tensor | None) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(*inputs)
        return y


def _example(module: Any) -> Tensor:
    """A small random input of a convolution or linear layer."""
    weight = module.weight
    factor = weight.factors[0] if isinstance(module, FactorizedLayer) else weight
    features = weight.shape[1] * getattr(module, "groups", 1)
    window = getattr(module, "kernel_size", ())
    dilation = getattr(module, "dilation", ())
    sizes = [d * (k - 1) + 4 for k, d in zip(window, dilation, strict=True)]
    return _random((2, features, *sizes)).to(factor)


def _random(shape: Sequence[int]) -> Tensor:
    """Random numbers that leave the caller's generator where it is."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
