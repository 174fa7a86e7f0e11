"""Folding for inference: what follows a layer goes into the layer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from tensorcomp_ext.compress.fold_graph import Finding, Folder, hooked
from tensorcomp_ext.compress.fold_weights import difference, tolerance
from tensorcomp_ext.nn import FactorizedLayer, FactorizedLinear
from tensorcomp_ext.plan.examples import call_model
from tensorcomp_ext.plan.modes import evaluating

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


class _SequenceTracer(fx.Tracer):
    """Looks into nothing: the graph calls the modules of a sequence one after another."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def fold(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A copy of a compressed network for inference, in which layers take in what follows them.

    Batch normalization goes into the last factor and the bias of a factorized layer, and into the weight of a
    torch.nn convolution or linear layer; ReLU and the addition of a residual into the store of a factorized
    layer's kernel. Each fold is compared with the modules it replaces on random inputs before it is made, and
    the whole with the network where there are example inputs. Tuned choices are kept, unless the format
    changes; ``tensorcomp_ext.tune`` of the result measures what was folded.

    The network is traced by torch.fx, which runs its Python code once: what depends on values of the inputs
    cannot be traced, and arguments that the example leaves at their defaults stay there. Where the whole
    cannot be traced its parts are, as far as nothing but their ``forward`` can be asked of them.

    Args:
        model: any network; it is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, or None. Without one,
            networks with optional arguments are folded part by part, and linear layers keep the batch
            normalization that follows them.

    Returns:
        The folded network in evaluation mode, no parameter asking for gradients; its ``fold_report`` says
        what was folded, and what was not and why. It cannot be saved: save before, and fold after loading.

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
    twin = copy.deepcopy(model).eval()
    dims: dict[int, set[int]] = {} if example_inputs is None else _output_dims(twin, example_inputs)
    made = _folded(twin, "", report, dims, example_inputs).requires_grad_(False)
    if example_inputs is not None:
        report.difference = _compare(model, made, example_inputs)
    made.fold_report = report  # type: ignore[assignment]
    return made


def _folded(
    module: nn.Module, name: str, report: FoldReport, dims: Mapping[int, set[int]], example: Any = None
) -> nn.Module:
    """``module`` folded as a whole, or its children where it cannot be."""
    if isinstance(module, FactorizedLayer) or not any(True for _ in module.children()):
        return module
    try:
        traced = _traced(module, example)
    except _UNTRACEABLE as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        report.left.append(Finding(name or "(model)", f"not folded as a whole: {first}"))
        if type(module) is nn.Sequential and not hooked(module):
            _fold_sequence(module, name, report, dims)
        for child_name, child in module.named_children():
            whole = f"{name}.{child_name}".lstrip(".")
            if type(child) is nn.Sequential:
                # Others may walk through it or take its parts: it stays what it is.
                if not hooked(child):
                    _fold_sequence(child, whole, report, dims)
                for key, part in child.named_children():
                    child.add_module(key, _folded_part(part, f"{whole}.{key}", report, dims))
            else:
                module.add_module(child_name, _folded_part(child, whole, report, dims))
        return module
    return _fold_traced(traced, name, report, dims) or module


def _folded_part(module: nn.Module, name: str, report: FoldReport, dims: Mapping[int, set[int]]) -> nn.Module:
    """A part of a network that could not be folded as a whole."""
    own = [key for key in vars(type(module)) if not key.startswith("_") and key != "forward"]
    if own and any(True for _ in module.children()):
        text = f"not folded as a whole: other code may use its {', '.join(sorted(own))}"
        report.left.append(Finding(name, text))
        return module
    return _folded(module, name, report, dims)


def _fold_traced(
    traced: fx.GraphModule, name: str, report: FoldReport, dims: Mapping[int, set[int]]
) -> fx.GraphModule | None:
    folder = Folder(traced, f"{name}." if name else "", dims)
    found = folder.run()
    report.folded += folder.folded
    report.left += folder.left
    return traced.eval() if found else None


def _fold_sequence(
    sequence: nn.Sequential, name: str, report: FoldReport, dims: Mapping[int, set[int]]
) -> None:
    """Fold the modules of a sequence into each other, an identity in the place of each that is gone."""
    made = _fold_traced(fx.GraphModule(sequence, _SequenceTracer().trace(sequence)), name, report, dims)
    if made is None:
        return
    kept = {str(node.target) for node in made.graph.nodes if node.op == "call_module"}
    for key in list(dict(sequence.named_children())):
        sequence.add_module(key, made.get_submodule(key) if key in kept else nn.Identity())


def _traced(module: nn.Module, example: Any) -> fx.GraphModule:
    """The network as a graph, arguments that ``example`` leaves out at their defaults.

    Raises:
        one of ``_UNTRACEABLE``: it cannot be traced, or hooks or optional arguments forbid it.
    """
    tracer = _Tracer()
    inlined = [m for path, m in module.named_modules() if not path or not tracer.is_leaf_module(m, path)]
    if any(hooked(m) for m in inlined):
        raise ValueError("it has hooks, which its graph would not call")
    optional = {
        key: parameter.default
        for key, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    if example is None and optional:
        raise ValueError(
            f"its forward has optional arguments ({', '.join(optional)}), and there is no example"
        )
    if isinstance(example, Mapping):
        given = set(example)
    else:
        count = 1 if not isinstance(example, tuple) else len(example)
        given = set(list(inspect.signature(module.forward).parameters)[:count])
    fixed = {key: default for key, default in optional.items() if key not in given}
    graph = tracer.trace(module, concrete_args=fixed or None)
    return fx.GraphModule(tracer.root, graph, type(module).__name__)


def _output_dims(model: nn.Module, example_inputs: Any) -> dict[int, set[int]]:
    """How many dims the outputs of each linear layer have, by the layer's identity."""
    seen: dict[int, set[int]] = {}

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.setdefault(id(module), set()).add(output.dim())

    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, FactorizedLinear))]
    handles = [m.register_forward_hook(note) for m in linear]
    try:
        with torch.no_grad():
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _compare(model: nn.Module, made: nn.Module, example_inputs: Any) -> float:
    with evaluating(model), torch.no_grad():
        expected = _tensors(call_model(model, example_inputs))
        try:
            found = _tensors(call_model(made, example_inputs))
        except _UNTRACEABLE as error:
            raise FoldError(f"fold: the folded network cannot be called with the example: {error}") from error
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
