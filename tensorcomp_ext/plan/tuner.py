"""Measures the candidates of every factorized layer on this machine and keeps the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .agree import TRIED_DEVICES, disagreements
from .base import get_plan, offered, plans_for
from .case import Case
from .clock import clock_for
from .examples import call_model
from .graphs import captured, check_graphs
from .layer import PlannedLayer
from .modes import evaluating
from .timing import time_interleaved
from .tuning import LayerTuning, Timing, TuneResult

Progress = Callable[[int, int, str], None]

_BUDGET = 25.0
_TIE = 1.02


@dataclass(frozen=True)
class _Like:
    """What a tensor is but for its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> _Like:
        return _Like(tuple(x.shape), x.stride(), x.dtype, x.device)

    def random(self, requires_grad: bool = False) -> Tensor:
        # An expanded input is made again by expanding: torch fills no entry twice.
        stored = [1 if step == 0 else size for size, step in zip(self.shape, self.stride, strict=True)]
        x = torch.empty_strided(stored, self.stride, dtype=self.dtype, device=self.device).normal_()
        return x.as_strided(self.shape, self.stride).requires_grad_(requires_grad)


@dataclass(frozen=True)
class _Sample:
    x: _Like
    case: Case
    residual: _Like | None = None
    """What a folded layer was given to add."""


def tune(
    model: nn.Module,
    example_inputs: Any,
    *,
    training: bool = False,
    progress: Progress | None = None,
    min_seconds: float = 0.1,
    cuda_graphs: bool = False,
) -> TuneResult:
    """Measure the candidate plans of every factorized layer of ``model`` and keep the fastest for each.

    The model runs once on each example to learn the shapes its layers see; then each layer's candidates are
    timed alone, interleaved, after a warm-up, and the lowest median wins. The dense layer is always among
    them and wins where it is within 2 % of the lowest, which noise can turn, so no layer ends up slower than
    what it replaced. Layers of equal geometry and rank share one
    measurement. An interrupt (Ctrl-C) keeps the choices made so far.

    Calls are timed with cold second-level caches, as between the other layers of a network. On CUDA they are
    timed by events on the current stream. The time to
    launch a call counts where it is longer than the device's work, as in a network whose layers are called
    one by one; a network served under CUDA graphs launches nothing, and ``cuda_graphs`` tunes for that.
    There, a plan of the package's own kernels takes part only if its results are the library's.

    Args:
        model: a model with factorized layers, or such a layer.
        example_inputs: a tensor; a tuple of positional or a dict of keyword arguments; or a list of these,
            one for each batch size to tune for.
        training: tune forward and backward instead of inference.
        progress: called as ``progress(done, total, layer name)``.
        min_seconds: time spent on each candidate of each kind of layer, less where the whole would take over
            25 s.
        cuda_graphs: time replays of CUDA graphs instead of calls, for models served under CUDA graphs. A
            candidate that cannot be captured is listed as unavailable, with the reason.

    Raises:
        TypeError: ``model`` is no module (of what ``compress`` returns, pass ``.model``), or an example is
            neither tensor, tuple nor dict.
        ValueError: the model has no factorized layer, or the examples reach none; ``cuda_graphs`` with a
            factorized layer that is not on a CUDA device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"tune: model must be a torch.nn.Module, got {type(model).__name__}"
            + (" (pass its .model)" if hasattr(model, "model") else "")
        )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PlannedLayer)}
    if not layers:
        raise ValueError("tune: the model has no factorized layer")
    if cuda_graphs:
        check_graphs({name: layer.weight.factors[0].device for name, layer in layers.items()})
    start = time.perf_counter()
    work = _groups(layers, _record(model, layers, example_inputs, training))
    if not work:
        raise ValueError("tune: the example inputs reach no factorized layer")
    result = TuneResult()
    seconds = min(min_seconds, _BUDGET / max(1, _candidates(layers, work)))
    try:
        for done, (sample, members) in enumerate(work):
            if progress is not None:
                progress(done, len(work), members[0])
            # What the groups to come do not need may go into measuring this one again.
            later = seconds * _candidates(layers, work[done + 1 :])
            end = start + _BUDGET - later
            timings, unavailable = _measure(layers[members[0]], sample, training, seconds, cuda_graphs, end)
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


def _candidates(layers: Mapping[str, PlannedLayer], work: Sequence[tuple[_Sample, list[str]]]) -> int:
    """How many calls will be timed, a layer of each group measured."""
    groups = [(layers[members[0]], sample.case) for sample, members in work]
    return sum(offered(plan, layer, case).ok for layer, case in groups for plan in plans_for(layer))


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
            given = args[0] if args else kwargs["input"]
            x, residual = layer.as_batch(given), _residual(layer, args, kwargs)
            if residual is not None and x is not given:
                residual = layer.as_batch(residual)
            added = None if residual is None else _Like.of(residual)
            seen.append((name, _Sample(_Like.of(x), layer.case(x, training), added)))

        return record

    handles = [
        layer.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            for example in example_inputs if isinstance(example_inputs, list) else [example_inputs]:
                call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rectifies(layer: PlannedLayer) -> bool | None:
    """Whether a folded layer rectifies; None of another layer."""
    return getattr(layer, "relu", None)


def _residual(layer: PlannedLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    if _rectifies(layer) is None:
        return None
    given = args[1] if len(args) > 1 else kwargs.get("residual")
    return given if isinstance(given, Tensor) else None


def _groups(
    layers: Mapping[str, PlannedLayer], seen: Sequence[tuple[str, _Sample]]
) -> list[tuple[_Sample, list[str]]]:
    """Layers that one measurement serves, under the first sample seen."""
    groups: dict[Any, tuple[_Sample, list[str]]] = {}
    for name, sample in seen:
        layer, weight = layers[name], layers[name].weight
        # The modes into which a format folds the sizes are of its structure.
        form = (weight.name, weight.rank, tuple(weight.shape), str(sorted(weight.structure.items())))
        kind = (type(layer), layer.geometry, form, _rectifies(layer))
        trained = tuple(p.requires_grad for p in layer.parameters()) if sample.case.training else ()
        key = (kind, layer.bias is None, trained, sample.case, sample.x.stride, sample.residual)
        _, members = groups.setdefault(key, (sample, []))
        if name not in members:
            members.append(name)
    return list(groups.values())


def _measure(
    layer: PlannedLayer, sample: _Sample, training: bool, seconds: float, cuda_graphs: bool, end: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    unavailable: dict[str, str] = {}
    calls: dict[str, Callable[[], object]] = {}
    if sample.x.dtype.is_floating_point:
        x = sample.x.random(requires_grad=training)
    else:  # indices: as different as those of a call
        like = sample.x
        x = torch.randint(layer.weight.shape[0], like.shape, dtype=like.dtype, device=like.device)
    residual = None if sample.residual is None else sample.residual.random()
    for plan in plans_for(layer):
        support = offered(plan, layer, sample.case)
        if support.ok:
            calls[plan.name] = _call(layer, plan.name, x, residual, training)
        else:
            unavailable[plan.name] = support.reason
    with torch.enable_grad() if training else torch.inference_mode():
        if x.device.type not in TRIED_DEVICES:
            wrong = disagreements(calls)
            unavailable |= wrong
            calls = {name: call for name, call in calls.items() if name not in wrong}
        if not cuda_graphs:
            return _steady_times(calls, seconds, end, x.device), unavailable
        calls, refused = captured(calls, x.device)
        clock = clock_for(x.device, queued=True)
        return _steady_times(calls, seconds, end, x.device, clock), unavailable | refused


def _steady_times(
    calls: Mapping[str, Callable[[], object]], seconds: float, end: float, *how: Any
) -> dict[str, Timing]:
    """Times of the calls; measured once more, the lower median counting, where something disturbed them.

    The second time lasts no longer than until ``end`` on the clock, and is left out where that has come.
    """
    timings = time_interleaved(calls, seconds, *how)
    left = end - time.perf_counter()
    if left <= 0 or all(t.steady for t in timings.values()):
        return timings
    again = time_interleaved(calls, min(seconds, left / max(1, len(calls))), *how)
    return {name: min(t, again[name], key=lambda found: found.median) for name, t in timings.items()}


def _call(
    layer: PlannedLayer, name: str, x: Tensor, residual: Tensor | None, training: bool
) -> Callable[[], object]:
    plan = get_plan(name)
    if not training:
        with torch.no_grad():
            bound = layer.executor(plan, x)
        bias = layer.bias
        given = (x, bias) if residual is None else (x, bias, residual)
        return lambda: bound(*given)
    # Of a layer with gates on its ranks the plan knows the factors alone.
    own = (*layer.weight.parameters(), *(() if layer.bias is None else (layer.bias,)))
    wanted = [t for t in (x, *own) if t.requires_grad]
    with torch.no_grad():
        gradient = torch.ones_like(plan.run(layer, x))
    call = plan.bind_training(layer, layer.case(x, training=True))

    def result() -> Tensor:
        y: Tensor = call(layer, x)
        if residual is not None:
            y = y + residual
        return y.relu() if _rectifies(layer) else y

    return lambda: torch.autograd.grad(result(), wanted, gradient)
