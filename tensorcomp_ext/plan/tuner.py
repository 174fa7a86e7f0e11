"""Measures the candidates of every factorized layer on this machine and keeps the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import get_plan, plans_for
from .case import Case
from .examples import call_model
from .layer import PlannedLayer
from .tuning import LayerTuning, Timing, TuneResult

Progress = Callable[[int, int, str], None]

_BUDGET = 25.0
_MIN_ROUNDS = 5
_HOPELESS = 5.0
_TIE = 1.02


@dataclass
class _Sample:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    case: Case

    def input(self, requires_grad: bool) -> Tensor:
        # An expanded input is made again by expanding: torch fills no entry twice.
        stored = [1 if step == 0 else size for size, step in zip(self.shape, self.stride, strict=True)]
        x = torch.empty_strided(stored, self.stride, dtype=self.dtype, device=self.device).normal_()
        return x.as_strided(self.shape, self.stride).requires_grad_(requires_grad)


def tune(
    model: nn.Module,
    example_inputs: Any,
    *,
    training: bool = False,
    progress: Progress | None = None,
    min_seconds: float = 0.1,
) -> TuneResult:
    """Measure the candidate plans of every factorized layer of ``model`` and keep the fastest for each.

    The model runs once on each example to learn the shapes its layers see; then each layer's candidates are
    timed alone, interleaved, after a warm-up, and the lowest median wins. The dense layer is always among
    them and wins where it is within 2 % of the lowest, which noise can turn, so no layer ends up slower than
    what it replaced. Layers of equal geometry and rank share one
    measurement. An interrupt (Ctrl-C) keeps the choices made so far.

    Args:
        model: a model with factorized layers, or such a layer.
        example_inputs: a tensor; a tuple of positional or a dict of keyword arguments; or a list of these,
            one for each batch size to tune for.
        training: tune forward and backward instead of inference.
        progress: called as ``progress(done, total, layer name)``.
        min_seconds: time spent on each candidate of each kind of layer, less where the whole would take over
            25 s.

    Raises:
        TypeError: ``model`` is no module (of what ``compress`` returns, pass ``.model``), or an example is
            neither tensor, tuple nor dict.
        ValueError: the model has no factorized layer, or the examples reach none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"tune: model must be a torch.nn.Module, got {type(model).__name__}"
            + (" (pass its .model)" if hasattr(model, "model") else "")
        )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PlannedLayer)}
    if not layers:
        raise ValueError("tune: the model has no factorized layer")
    start = time.perf_counter()
    work = _groups(layers, _record(model, layers, example_inputs, training))
    if not work:
        raise ValueError("tune: the example inputs reach no factorized layer")
    result = TuneResult()
    seconds = min(min_seconds, _BUDGET / (3 * len(work)))
    try:
        for done, (sample, members) in enumerate(work):
            if progress is not None:
                progress(done, len(work), members[0])
            timings, unavailable = _measure(layers[members[0]], sample, training, seconds)
            if not timings:
                continue
            choice = _fastest(timings)
            medians = {name: t.median for name, t in timings.items()}
            for name in members:
                layers[name].tuned[str(sample.case)] = {"plan": choice, "seconds": dict(medians)}
                layers[name].choices_changed()
                result.layers.append(LayerTuning(name, str(sample.case), choice, timings, unavailable))
        if progress is not None:
            progress(len(work), len(work), "")
    except KeyboardInterrupt:
        result.interrupted = True
    result.seconds = time.perf_counter() - start
    return result


def _fastest(timings: Mapping[str, Timing]) -> str:
    """The plan of the lowest median; the dense one where it comes within the noise of it."""
    best = min(timings, key=lambda name: timings[name].median)
    dense = timings.get("dense")
    return "dense" if dense is not None and dense.median <= _TIE * timings[best].median else best


def _record(
    model: nn.Module, layers: Mapping[str, PlannedLayer], example_inputs: Any, training: bool
) -> list[tuple[str, _Sample]]:
    """The inputs each layer sees, in order; the model's modes and running statistics stay as they were."""
    seen: list[tuple[str, _Sample]] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer = layers[name]
            x = layer.as_batch(args[0] if args else kwargs["input"])
            seen.append(
                (name, _Sample(tuple(x.shape), x.stride(), x.dtype, x.device, layer.case(x, training)))
            )

        return record

    modes = [(module, module.training) for module in model.modules()]
    handles = [
        layer.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        model.eval()
        with torch.no_grad():
            for example in example_inputs if isinstance(example_inputs, list) else [example_inputs]:
                call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return seen


def _groups(
    layers: Mapping[str, PlannedLayer], seen: Sequence[tuple[str, _Sample]]
) -> list[tuple[_Sample, list[str]]]:
    """Layers that one measurement serves, under the first sample seen."""
    groups: dict[Any, tuple[_Sample, list[str]]] = {}
    for name, sample in seen:
        layer = layers[name]
        kind = (type(layer), layer.geometry, layer.weight.name, layer.weight.rank, tuple(layer.weight.shape))
        trained = tuple(p.requires_grad for p in layer.parameters()) if sample.case.training else ()
        key = (kind, layer.bias is None, trained, sample.case, sample.stride)
        _, members = groups.setdefault(key, (sample, []))
        if name not in members:
            members.append(name)
    return list(groups.values())


def _measure(
    layer: PlannedLayer, sample: _Sample, training: bool, seconds: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    unavailable, calls = {}, {}
    x = sample.input(requires_grad=training)
    for plan in plans_for(layer):
        support = plan.support(layer, sample.case)
        if support.ok:
            calls[plan.name] = _call(layer, plan.name, x, training)
        else:
            unavailable[plan.name] = support.reason
    with torch.enable_grad() if training else torch.inference_mode():
        return time_interleaved(calls, seconds, x.device.type), unavailable


def _call(layer: PlannedLayer, name: str, x: Tensor, training: bool) -> Callable[[], object]:
    plan = get_plan(name)
    if not training:
        with torch.no_grad():
            bound = layer.executor(plan, x)
        bias = layer.bias
        return lambda: bound(x, bias)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with torch.no_grad():
        gradient = torch.ones_like(plan.run(layer, x))
    call = plan.bind_training(layer, layer.case(x, training=True))
    return lambda: torch.autograd.grad(call(layer, x), wanted, gradient)


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, device: str = "cpu"
) -> dict[str, Timing]:
    """Time several calls turn by turn (A B C A B C), so that a change of the machine's state hits all alike.

    A call more than five times slower than the fastest after the warm-up gets few rounds.

    Args:
        seconds: time to spend on each.
    """

    def once(call: Callable[[], object], repeats: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    first = {}
    for name, call in calls.items():
        once(call, 1)
        first[name] = min(once(call, 1), once(call, 1))
    best = min(first.values(), default=0.0)
    # Samples of at least 50 us, that the clock's own cost does not show.
    repeats = {name: max(1, round(5e-5 / max(spent, 1e-7))) for name, spent in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds = max(_MIN_ROUNDS, min(200, int(seconds / max(best, 5e-5))))
    end = time.perf_counter() + seconds * len(calls)
    for turn in range(rounds):
        if turn >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if turn < 3 or first[name] <= _HOPELESS * best:
                samples[name].append(once(call, repeats[name]))
    return {name: _timing(taken) for name, taken in samples.items()}


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        ordered[len(ordered) // 2], ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
    )
