"""Replace the layers of a trained network by factorised ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from tensorcomp_ext._warnings import warn
from tensorcomp_ext.compress.allocate import allocate, check_rule
from tensorcomp_ext.compress.calls import Call, output_distance, trace
from tensorcomp_ext.compress.factorize import (
    Choice,
    choose,
    factorize,
    not_called,
    skipped_entry,
    takes_groups,
)
from tensorcomp_ext.compress.measure import fill_costs, measure_latencies
from tensorcomp_ext.compress.report import LayerReport, Report
from tensorcomp_ext.compress.selection import (
    WHOLE,
    Uses,
    as_patterns,
    considered,
    format_and_options,
    matches,
    refusal,
    require_matches,
)
from tensorcomp_ext.compress.swap import adopt, copied, swapped
from tensorcomp_ext.formats import get_format
from tensorcomp_ext.ranks import VBMF, NetworkRule, RankSpec, parse_rank

Progress = Callable[[int, int, str], None]
FormatSpec = str | tuple[str, Mapping[str, Any]]


class CompressionResult(NamedTuple):
    """The compressed network and what was done to it."""

    model: nn.Module
    report: Report


def compress(
    model: nn.Module,
    format: FormatSpec | Mapping[Any, FormatSpec] | None = None,
    rank: RankSpec | None = None,
    example_inputs: Any = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    inplace: bool = False,
    measure: bool = False,
    progress: Progress | None = None,
) -> CompressionResult:
    """Replace convolutions, linear layers and embeddings of ``model`` by factorised layers of their weights.

    Works on a deep copy unless ``inplace``; either way it succeeds whole or leaves ``model`` as it was.
    Biases, dtype, device, training mode, ``requires_grad``, forward and backward hooks and everything outside
    the replaced layers stay. The weights become other Parameters, so an optimizer has to be made anew.

    Args:
        format: a format name, or ``(name, options)`` with options such as ``in_modes`` of the format and
            those of its decomposition (or ``start="random"``, which draws the factors), or a mapping from
            layer type or name pattern to one of these, first fit; where it says nothing convolutions become
            "tucker2", linear layers "svd" and embeddings "ttm".
        rank: an int, a tuple (``(R_out, R_in)`` for "tucker2"), a float in (0, 1] (the fraction of the dense
            weight's parameters to keep), a rule of ``tensorcomp_ext.ranks``, text as ``ranks.parse_rank``
            takes it ("vbmf", "energy:0.95", "16,24", "latency:2.0"), or a mapping from name pattern to one of
            these, first fit, "*" last (layers that none fits stay dense). Default: ``VBMF()``, which reads
            spectra: for "cp", "tr" and "tr_matrix", whose ranks no unfolding decides, give rank or budget.
            ``ranks.Latency``, ``NetworkParams`` and ``NetworkFlops`` choose for the network as a whole.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With it the compressed
            network is run and compared, and the report has shapes and MACs. Only layers called on it are
            replaced.
        layers: patterns of the names to replace; None takes all.
        exclude: patterns of the names to leave dense.
        inplace: change ``model`` itself.
        measure: also measure the latency of every replaced layer, before and after (on ``example_inputs``).
        progress: called as ``progress(done, total, layer_name)``.

    Layers that cannot be replaced without risk to the results are left dense, as are those that would not get
    smaller, unless an int or tuple asks for it; the report gives the reasons. Patterns are shell style
    (``*`` crosses dots) and match whole names of layers.

    Cost: one decomposition per layer, in float64 on the CPU.

    Raises:
        ValueError: a weight with NaN or Inf or without a convergent SVD (the layer is named); a pattern that
            matches no layer; unknown format; invalid rank; nothing to replace although ``layers`` was given;
            a compressed model that does not run on ``example_inputs``; a rule for whole networks that is left
            no layer, or ``Latency`` and ``NetworkFlops`` without ``example_inputs``.
        TypeError: arguments of another type.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> model, report = compress(net, rank=8, layers="0")
    >>> report["0"].parameters_before, report["0"].parameters_after
    (4096, 1024)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress: model must be a torch.nn.Module, got {type(model).__name__}")
    if measure and example_inputs is None:
        raise ValueError("compress: measure=True needs example_inputs")
    if inplace and any(name == "" and not isinstance(m, WHOLE) for name, m in considered(model)):
        raise ValueError(
            "compress: the model is itself one layer, which cannot be replaced in place; take result.model"
        )
    rank = VBMF() if rank is None else _parsed(rank)
    found = dict(considered(model))
    wanted = None if layers is None else as_patterns(layers, "layers")
    unwanted = as_patterns(exclude, "exclude")
    _check_patterns(list(found), wanted, unwanted, format, rank)

    dense_output, calls = (None, None) if example_inputs is None else trace(model, found, example_inputs)
    uses = Uses(model)
    entries: dict[str, LayerReport] = {}
    choices: list[Choice] = []
    heard: dict[str, list[warnings.WarningMessage]] = {}
    for name, layer in found.items():
        if (wanted is not None and not matches(name, wanted)) or matches(name, unwanted):
            reason: str | None = "excluded" if matches(name, unwanted) else "not among the layers asked for"
        else:
            reason = refusal(name, layer, uses, takes_groups(name, layer, format)) or not_called(name, calls)
        with warnings.catch_warnings(record=True) as heard[name]:
            warnings.simplefilter("always")
            chosen = reason or choose(name, layer, format, rank, calls[name] if calls is not None else ())
        if isinstance(chosen, Choice):
            choices.append(chosen)
        else:
            entries[name] = skipped_entry(name, layer, chosen)
    _pass_on(heard)

    details: dict[str, Any] = {}
    if isinstance(rank, NetworkRule):
        check_rule(
            rank, choices, {name: entry.skipped or "" for name, entry in entries.items()}, example_inputs
        )
        choices, dense, details = allocate(
            rank, model, choices, calls, example_inputs, count_parameters(model), progress
        )
        entries |= {name: skipped_entry(name, found[name], reason) for name, reason in dense.items()}

    replacements: dict[str, nn.Module] = {}
    for index, choice in enumerate(choices):
        if progress is not None:
            progress(index, len(choices), choice.name)
        entries[choice.name], new = factorize(choice)
        if new is not None:
            replacements[choice.name] = new
    if progress is not None:
        progress(len(choices), len(choices), "")
    report = Report([entries[name] for name in found], count_parameters(model), count_parameters(model))
    report.details |= details
    if not replacements:
        _nothing(report, wanted)

    former = {name: found[name] for name in replacements}
    target = _exchange(model, replacements, inplace, example_inputs, dense_output, calls, report)
    report.parameters_after = count_parameters(target)
    if calls is not None:
        fill_costs(report, found, dict(considered(target)), calls)
    if measure and calls is not None:
        measure_latencies(report, former, dict(considered(target)), calls)
    return CompressionResult(target, report)


def count_parameters(model: nn.Module) -> int:
    """Entries of all parameters of ``model``, shared ones once, lazy ones not."""
    return sum(
        p.numel() for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter)
    )


def _check_patterns(
    names: Sequence[str], wanted: Sequence[str] | None, unwanted: Sequence[str], format: Any, rank: Any
) -> None:
    require_matches(wanted or (), names, "layers")
    require_matches(unwanted, names, "exclude")
    if isinstance(rank, Mapping):
        require_matches(as_patterns(rank.keys(), "rank"), names, "rank")
    if isinstance(format, Mapping):
        require_matches([key for key in format if isinstance(key, str)], names, "format")
    for value in format.values() if isinstance(format, Mapping) else [format]:
        name, _ = format_and_options(value)
        if name is not None:
            get_format(name)


def _parsed(rank: Any) -> Any:
    """The rank with what is written as text in it parsed."""
    if isinstance(rank, Mapping):
        return {key: parse_rank(value) if isinstance(value, str) else value for key, value in rank.items()}
    return parse_rank(rank) if isinstance(rank, str) else rank


def _pass_on(heard: Mapping[str, Sequence[warnings.WarningMessage]]) -> None:
    """Warn the caller of what choosing ranks warned of, of all clipped ranks at once."""
    clipped: dict[str, str] = {}
    for name, messages in heard.items():
        for message in messages:
            if "; clipped to " in str(message.message):
                clipped.setdefault(name, str(message.message))
            else:
                warn(message.message)
    if clipped:
        count = "1 layer" if len(clipped) == 1 else f"{len(clipped)} layers, e.g."
        example = next(iter(clipped.values()))
        warn(f"compress: ranks clipped in {count} {example}")


def _nothing(report: Report, wanted: Sequence[str] | None) -> None:
    reasons = "; ".join(f"{layer.name or 'model'}: {layer.skipped}" for layer in report.layers[:8])
    message = (
        f"compress: nothing was replaced ({reasons or 'no convolution, linear layer or embedding found'})"
    )
    if wanted is not None:
        raise ValueError(message)
    warn(message)


def _exchange(
    model: nn.Module,
    replacements: Mapping[str, nn.Module],
    inplace: bool,
    example_inputs: Any,
    dense_output: Any,
    calls: Mapping[str, list[Call]] | None,
    report: Report,
) -> nn.Module:
    """Swap the layers in the model or in its copy, and run the outcome before it is handed out."""
    target = model if inplace else copied(model)
    if "" in replacements:
        target = adopt(replacements[""], target)
        replacements = {}
    else:
        modules = dict(target.named_modules(remove_duplicate=False))
        replacements = {name: adopt(new, modules[name]) for name, new in replacements.items()}
    with swapped(target, replacements):
        if calls is not None:
            report.output_error = _verify(target, replacements, example_inputs, dense_output)
    return target


def _verify(
    target: nn.Module, replacements: Mapping[str, nn.Module], example_inputs: Any, dense_output: Any
) -> float | None:
    try:
        output, calls = trace(target, replacements, example_inputs)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            "compress: the compressed model does not run on example_inputs "
            f"({type(error).__name__}: {error}); a module may read the weight of a replaced layer, "
            "which has to be excluded then"
        ) from error
    missed = [name for name, made in calls.items() if not made]
    if missed:
        raise ValueError(
            f"compress: layer {missed[0]!r} is reached by another route than its name in the module tree, so "
            "replacing it has no effect; exclude it"
        )
    return output_distance(dense_output, output)
