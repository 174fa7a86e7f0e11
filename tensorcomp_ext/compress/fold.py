"""Folding for inference: what follows a layer goes into the layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from tensorcomp_ext.compress.fold_graph import Finding, Folder
from tensorcomp_ext.compress.fold_weights import difference, tolerance
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.plan.examples import call_model

_UNTRACEABLE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
"""What a network's own code raises where it asks a proxy for what only a tensor has."""


class FoldError(ValueError):
    """The folded network does not compute what the network computes."""


@dataclass
class FoldReport:
    """What :func:`fold` did; printed, a line for each layer."""

    folded: list[Finding] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)
    """What stayed as it was, with the reason."""
    difference: float | None = None
    """Relative L2 difference of the outputs for the example inputs; None where there were none."""

    def __str__(self) -> str:
        lines = [f"{f.name}: {f.text}" for f in self.folded]
        lines += [f"{f.name}: left as it is: {f.text}" for f in self.left]
        if self.difference is not None:
            lines.append(f"outputs differ by {self.difference:.1e}")
        return "\n".join(lines) or "nothing to fold"


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FactorizedLayer) or super().is_leaf_module(m, module_qualified_name)


def fold(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A copy of a compressed network for inference, in which layers take in what follows them.

    Batch normalization goes into the last factor and the bias of a factorized layer, and into the weight of a
    torch.nn convolution or linear layer; ReLU and the addition of a residual into the store of a factorized
    layer's kernel. Where torch.fx cannot trace the network, its parts are folded one by one. Each fold is
    compared with the modules it replaces on random inputs before it is made, and the whole with the network
    where there are example inputs. Tuned choices are kept; ``tensorcomp_ext.tune`` of the result measures
    what was folded.

    Args:
        model: any network; it is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, or None.

    Returns:
        The folded network in evaluation mode, no parameter asking for gradients; its ``fold_report`` says
        what was folded, and what was not and why.

    Raises:
        TypeError: ``model`` is no module, or example inputs of another type.
        FoldError: with the folds the outputs differ by more than roundings explain. A ``ValueError``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fold: model must be a torch.nn.Module, got {type(model).__name__}"
            + (" (pass its .model)" if hasattr(model, "model") else "")
        )
    report = FoldReport()
    made = _folded(copy.deepcopy(model).eval(), "", report).requires_grad_(False)
    if example_inputs is not None:
        report.difference = _compare(model, made, example_inputs)
    made.fold_report = report  # type: ignore[assignment]
    return made


def _folded(module: nn.Module, name: str, report: FoldReport) -> nn.Module:
    """``module`` folded as a whole, or its children where it cannot be traced."""
    if isinstance(module, FactorizedLayer) or not any(True for _ in module.children()):
        return module
    tracer = _Tracer()
    try:
        graph = tracer.trace(module)
    except _UNTRACEABLE as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        report.left.append(Finding(name or "(model)", f"torch.fx cannot trace it: {first}"))
        for child_name, child in module.named_children():
            setattr(module, child_name, _folded(child, f"{name}.{child_name}".lstrip("."), report))
        return module
    traced = fx.GraphModule(tracer.root, graph, type(module).__name__)
    folder = Folder(traced, f"{name}." if name else "")
    found = folder.run()
    report.folded += folder.folded
    report.left += folder.left
    return traced.eval() if found else module


def _compare(model: nn.Module, made: nn.Module, example_inputs: Any) -> float:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            expected = _tensors(call_model(model, example_inputs))
            found = _tensors(call_model(made, example_inputs))
    finally:
        for module, mode in modes:
            module.training = mode
    worst = max((difference(f, e) for f, e in zip(found, expected, strict=True)), default=0.0)
    limit = max((tolerance(e.dtype) for e in expected), default=0.0)
    if not worst <= limit:
        raise FoldError(
            f"fold: the outputs of the folded network differ by {worst:.1e} (relative L2), more than the "
            f"{limit:.0e} that roundings explain; the network was left as it is"
        )
    return worst


def _tensors(output: Any) -> list[Tensor]:
    leaves: list[Any] = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
