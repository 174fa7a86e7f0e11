"""Costs of the layers of a report: MACs of the plans that run, and latencies before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tensorcomp_ext.compress.calls import Call, dense_macs, trace
from tensorcomp_ext.compress.latency import Latency, device_synchronizer, interleave
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.compress.selection import considered
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.plan import Candidate
from tensorcomp_ext.plan.layer import PlannedLayer
from tensorcomp_ext.plan.modes import evaluating

Progress = Callable[[int, int, str], None]


def fill_costs(
    report: Report,
    dense: Mapping[str, nn.Module],
    compressed: Mapping[str, nn.Module],
    calls: Mapping[str, list[Call]],
) -> None:
    """Write input shapes, MACs and plans into ``report``; mappings are by layer name."""
    for layer in report.layers:
        made = calls.get(layer.name) or []
        if not made:
            continue
        layer.input_shape = made[0].shape
        new = compressed[layer.name]
        before = [_dense_macs(dense.get(layer.name, new), call) for call in made]
        layer.macs_before = None if None in before else sum(count for count in before if count is not None)
        if isinstance(new, FactorizedLayer):
            chosen = [chosen_plan(new, call) for call in made]
            layer.macs_after = sum(plan.macs for plan in chosen)
            layer.plan = chosen[0].name
        else:
            layer.macs_after = layer.macs_before


def _dense_macs(layer: nn.Module, call: Call) -> int | None:
    return layer.dense_macs(call.shape) if isinstance(layer, FactorizedLayer) else dense_macs(layer, call)


def chosen_plan(layer: PlannedLayer, call: Call) -> Candidate:
    """The plan that runs in inference for an input such as the recorded one."""
    return next(plan for plan in layer.plans(call.input(), training=False) if plan.chosen)


def measure_latencies(
    report: Report,
    dense: Mapping[str, nn.Module],
    compressed: Mapping[str, nn.Module],
    calls: Mapping[str, list[Call]],
    seconds: float = 0.1,
    progress: Progress | None = None,
) -> None:
    """Measure replaced layers on random inputs of the recorded geometry, dense and compressed in turn.

    ``seconds`` is spent per layer, on both together. Evaluation mode, no autograd; hooks of the layers do not
    run.
    """
    subjects = [layer for layer in report.replaced if calls.get(layer.name) and layer.name in dense]
    for index, layer in enumerate(subjects):
        if progress is not None:
            progress(index, len(subjects), layer.name)
        before, after = dense[layer.name], compressed[layer.name]
        with evaluating(before, after), torch.random.fork_rng(devices=[]), torch.inference_mode():
            x = calls[layer.name][0].input()
            if x.is_floating_point():
                x.normal_()
            else:
                rows: Any = before.num_embeddings
                x.random_(0, rows)
            taken = interleave(
                {"before": partial(before.forward, x), "after": partial(after.forward, x)},
                seconds,
                synchronize=device_synchronizer(after),
            )
        layer.latency_before, layer.latency_after = taken["before"], taken["after"]
    if progress is not None:
        progress(len(subjects), len(subjects), "")


def refresh(
    report: Report,
    compressed: nn.Module,
    example_inputs: Any,
    dense: nn.Module | None = None,
    seconds: float = 0.1,
    progress: Progress | None = None,
) -> Report:
    """Bring the costs in ``report`` up to date, after tuning or for other example inputs, and return it.

    ``compressed`` is the network the report is about; with the network it was made from as ``dense``,
    latencies are measured too, for ``seconds`` per layer. Relative errors and ranks are left alone.
    """
    after = dict(considered(compressed))
    _, calls = trace(compressed, after, example_inputs)
    before = {} if dense is None else dict(considered(dense))
    fill_costs(report, before, after, calls)
    if dense is not None:
        measure_latencies(report, before, after, calls, seconds, progress)
    return report


def speedup(before: Latency, after: Latency) -> float:
    """How many times faster the median became."""
    return before.p50 / after.p50
