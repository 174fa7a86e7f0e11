"""The suite of whole networks: is the compressed one ever slower than the dense one?"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compress import fold
from ..plan import PlannedLayer, tune
from .candidates import Candidate, Group, compile_call
from .cases import DTYPES
from .cuda_timing import first_line
from .devices import Device
from .measure import STAGED, TUNED, measure_candidates, refused, wrong
from .network_build import folded, inputs, networks, parameters, staged, with_tltorch
from .network_cases import LAYOUT, NetworkCase
from .problem import distance
from .roofline import Probe
from .timing import Effort

TOLERANCE = {"float32": 1e-3, "tf32": 5e-2, "float16": 5e-2, "bfloat16": 1.5e-1}
"""Relative L2 distance of the outputs from the same network in float64, rounding of every layer together."""

DENSE, UNTUNED, FOLDED = "dense", "ours untuned", "ours folded"
TIE = 1.02
"""Noise that tuning itself calls a tie."""

_TUNE_S = 0.01
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError)


def measure_network(
    case: NetworkCase,
    direction: str,
    threads: int,
    *,
    device: Device,
    compiled: str,
    effort: Effort,
    probe: Probe,
) -> dict[str, Any]:
    """One row as JSON types: the dense network (eager, folded, compiled), the compressed one in stages of
    the library and of tltorch, and ours before and after ``tune`` and folded; on CUDA also as graphs.

    A training step is forward, cross entropy, backward and an SGD step with momentum (of rate zero, so that
    every call meets the same weights). Outputs are compared with the network's own in float64; gradients are
    not, where one flipped ReLU outweighs all rounding.
    """
    training = direction == "backward"
    row: dict[str, Any] = {
        "case": case.to_dict(),
        "label": case.label(),
        "direction": direction,
        "threads": threads,
        "device": device.name,
        "error": None,
    }
    try:
        dense, compressed = networks(case.network, case.scheme, case.rank)
    except _FAILURES as error:
        return row | {"error": first_line(error)}
    row["parameters"] = {"dense": parameters(dense), "compressed": parameters(compressed)}
    with device.settings(case.dtype or "float32"), torch.set_grad_enabled(training):
        return row | _measure(case, training, device, compiled, effort, dense, compressed)


class _Built:
    """One network in the dtype and on the device of a row, and its float64 answer."""

    def __init__(
        self,
        model: nn.Module,
        case: NetworkCase,
        training: bool,
        device: Device,
        expected: Tensor | None = None,
    ) -> None:
        dtype = DTYPES[case.dtype or "float32"]
        self.case, self.training, self.device = case, training, device
        self.x = inputs(case.network, case.batch, dtype, device.name)
        self.model = self._copy(model, dtype)
        self.expected = self._answer() if expected is None else expected
        rows = self.expected.numel() // self.expected.shape[-1]
        self.target = torch.zeros(rows, dtype=torch.long, device=device.name)

    def _answer(self) -> Tensor:
        # Where cuDNN measures every algorithm it has, it does so for float64 too, for minutes.
        cudnn = torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, False
        try:
            with torch.no_grad():
                return self._copy(self.model, torch.float64)(self.x.double())
        finally:
            cudnn.benchmark = before

    def _copy(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        with torch.inference_mode(False):
            made = copy.deepcopy(model).to(self.device.name, dtype)
            made = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return made.train(self.training).requires_grad_(self.training)

    def fault(self, outputs: tuple[Tensor, ...]) -> str | None:
        error, allowed = distance(outputs[0], self.expected), TOLERANCE[self.case.dtype or "float32"]
        if not error <= allowed:
            return f"outputs are {error:.1e} from float64 (relative L2), allowed {allowed:.0e}"
        return None

    def fold(self) -> None:
        """Let ``tensorcomp_ext.fold`` have the network."""
        with torch.inference_mode(False):
            self.model = fold(self.model, self.x)

    def tune(self, graph: bool) -> str:
        """Tune the compressed network for its input; how many layers run which plan."""
        with torch.inference_mode(False):
            found = tune(self.model, self.x, training=self.training, min_seconds=_TUNE_S, cuda_graphs=graph)
        choices = Counter(entry.choice for entry in found.layers)
        return ", ".join(f"{count} {plan}" for plan, count in sorted(choices.items()))

    def call(self, run: Callable[[Tensor], Tensor] | None = None) -> Callable[[], tuple[Tensor, ...]]:
        forward, x = run or self.model, self.x
        if not self.training:

            def infer() -> tuple[Tensor, ...]:
                with torch.inference_mode():
                    return (forward(x),)

            return infer
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

        def train() -> tuple[Tensor, ...]:
            optimizer.zero_grad(set_to_none=True)
            y = forward(x)
            nn.functional.cross_entropy(y.float().flatten(0, -2), self.target).backward()
            optimizer.step()
            return (y.detach(),)

        return train


class _Row:
    """The candidates of a row, each with what its outputs are compared with."""

    def __init__(
        self, case: NetworkCase, training: bool, device: Device, dense: nn.Module, compressed: nn.Module
    ) -> None:
        self.case, self.training, self.device = case, training, device
        self.candidates: list[Candidate] = []
        self._faults: dict[str, Callable[[tuple[Tensor, ...]], str | None]] = {}
        self._sources = {"dense": dense, "compressed": compressed}
        self._expected: dict[str, Tensor] = {}
        self.graphs = (False, True) if device.name == "cuda" and not training else (False,)

    def built(self, source: str, change: Callable[[nn.Module], nn.Module] | None = None) -> _Built:
        """The dense or the compressed network, ``change`` applied, in the row's dtype; both have one answer
        in float64 whatever becomes of them."""
        model = self._sources[source]
        if change is not None:
            with torch.inference_mode(False), torch.enable_grad():
                model = change(model)
        made = _Built(model, self.case, self.training, self.device, self._expected.get(source))
        self._expected.setdefault(source, made.expected)
        return made

    def add(
        self,
        name: str,
        group: Group,
        make: Callable[[], tuple[_Built, str | None]],
        graphs: Sequence[bool] = (False,),
    ) -> None:
        """A candidate, or its refusal with the reason."""
        try:
            made, note = make()
        except _FAILURES as error:
            self.candidates.append(refused(f"{name} eager", group, LAYOUT, first_line(error)))
            return
        for graph in graphs:
            label = f"{name} graph" if graph else f"{name} eager"
            self.candidates.append(Candidate(label, group, LAYOUT, made.call(), graph=graph, note=note))
            self._faults[label] = made.fault

    def add_compiled(self, name: str, built: _Built, frozen: bool) -> None:
        run = compile_call(built.model, frozen=frozen)
        self.candidates.append(Candidate(name, "dense", LAYOUT, built.call(run), True, graph=False))
        self._faults[name] = built.fault

    def fault(self, candidate: Candidate, outputs: tuple[Tensor, ...]) -> str | None:
        return self._faults[candidate.name](outputs)


def _measure(
    case: NetworkCase,
    training: bool,
    device: Device,
    compiled: str,
    effort: Effort,
    dense: nn.Module,
    compressed: nn.Module,
) -> dict[str, Any]:
    row = _Row(case, training, device, dense, compressed)
    plain = row.built("dense")
    row.add(DENSE, "dense", lambda: (plain, None), row.graphs)
    if not training:
        row.add("dense folded", "dense", lambda: (row.built("dense", folded), None), row.graphs)
    if compiled != "never":
        # Frozen on the CPU: weights folded in and prepacked, batch normalisation gone.
        frozen = not training and device.name == "cpu"
        row.add_compiled("dense frozen" if frozen else "dense compiled", plain, frozen)
    row.add("stages", "stages", lambda: (row.built("compressed", staged), None), row.graphs)
    row.add("tltorch", "stages", lambda: (row.built("compressed", with_tltorch), None))
    if device.name == "cuda":
        row.add(STAGED, "ours", lambda: (_held(row.built("compressed"), "staged"), None), row.graphs)
    row.add(UNTUNED, "ours", lambda: (row.built("compressed"), None))
    for graph in row.graphs:  # the choice differs: launches cost nothing under a graph
        row.add(TUNED, "ours", lambda graph=graph: _tuned(row.built("compressed"), graph), (graph,))  # type: ignore[misc]
    if not training:
        row.add(FOLDED, "ours", lambda: _folded(row.built("compressed")))
    records, timed = measure_candidates(row.candidates, row.fault, device, effort)
    found = {"candidates": records, "wrong": wrong(records)}
    return found | verdict(records, {name: t.median_us for name, t in timed.items()})


def _held(built: _Built, plan: str) -> _Built:
    for module in built.model.modules():
        if isinstance(module, PlannedLayer):
            module.plan = plan
    return built


def _tuned(built: _Built, graph: bool) -> tuple[_Built, str]:
    return built, built.tune(graph)


def _folded(built: _Built) -> tuple[_Built, str]:
    built.fold()
    return built, built.tune(False)


def verdict(records: Sequence[Mapping[str, Any]], medians: Mapping[str, float]) -> dict[str, Any]:
    """Dense time over tuned time for each way of calling (eager, graph), and what a reader looks for first.

    ``ours_us`` is the tuned network in its fastest way; ``never_slower``: in no way is it more than 2 %
    behind the dense network called the same way. ``over_best_dense``: the fastest dense way of all, compiled
    and folded ones included, over the fastest of ours, folded included.
    """
    ratios = {
        mode: medians[f"{DENSE} {mode}"] / medians[f"{TUNED} {mode}"]
        for mode in ("eager", "graph")
        if {f"{DENSE} {mode}", f"{TUNED} {mode}"} <= set(medians)
    }
    if not ratios:
        errors = {r["name"]: r["error"] for r in records if r["error"]}
        return {"error": "; ".join(f"{name}: {text}" for name, text in errors.items()) or "not measured"}
    best = {
        group: min((name for name in medians if name.startswith(group)), key=lambda name: medians[name])
        for group in (DENSE, "ours")
    }
    return {
        "error": None,
        "ours_us": min(medians[f"{TUNED} {mode}"] for mode in ratios),
        "over_dense": ratios,
        "best_dense": best[DENSE],
        "best_ours": best["ours"],
        "over_best_dense": medians[best[DENSE]] / medians[best["ours"]],
        "never_slower": min(ratios.values()) >= 1 / TIE,
    }
