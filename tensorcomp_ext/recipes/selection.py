"""One run of rank selection by gates, whatever their distribution: from a dense network to a smaller one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensorcomp_ext._warnings import warn
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.ranks.gates import Gate

from .callbacks import Callback
from .decisions import Known, checked_run
from .gated import GatedNetwork, RankSelection
from .options import check_number
from .recount import recount
from .result import RecipeResult
from .start import check_start, factorized, structures
from .task import Task
from .train import train


@dataclass(frozen=True)
class Run:
    """What every recipe of rank selection is asked for beside its own options; see :func:`.l0`."""

    name: str
    rank: Any
    format: Any
    preset: str | None
    layers: str | Iterable[str] | None
    exclude: str | Iterable[str]
    start: str
    remove_below: float
    remove_every: int
    target: float | None
    gate_lr: float
    lr: float
    weight_decay: float
    seed: int
    example_inputs: Any
    callbacks: Iterable[Callback]

    def check(
        self,
        model: nn.Module,
        dataset: Dataset | Task,
        training: Mapping[str, Any],
        known: Known,
    ) -> list[Callback]:
        """The callbacks, after refusing what would be refused after the decompositions only.

        Args:
            training: as ``train`` takes it.
            known: settings of the callback that selects ranks, as far as they are known by then.
        """
        check_start(self.name, self.start)
        check_gates(self.name, self.remove_below, self.remove_every, self.target, self.gate_lr)
        options = {**training, "lr": self.lr, "weight_decay": self.weight_decay, "seed": self.seed}
        epochs = options.pop("epochs")
        return checked_run(
            self.name, dataset, epochs, options, model=model, callbacks=self.callbacks, known=known
        )


def check_gates(
    name: str, remove_below: float, remove_every: int, target: float | None, gate_lr: float
) -> None:
    """ValueError or TypeError for what cannot be, naming it."""
    check_number(name, "remove_below", remove_below, 0.0, 1.0, "[0, 1)")
    if type(remove_every) is not int or remove_every < 0:
        raise ValueError(f"{name}: remove_every must be an int >= 0, got {remove_every!r}")
    if target is not None:
        check_number(name, "target", target, 1.0, math.inf, "(1, inf)")
    check_number(name, "gate_lr", gate_lr, 0.0, math.inf, "[0, inf)")


def select(
    run: Run,
    model: nn.Module,
    dataset: Dataset | Task,
    gate: Gate,
    selection: type[RankSelection],
    options: dict[str, Any],
    training: dict[str, Any],
) -> RecipeResult:
    """Put layers into factors, train them with gates, and cut what the gates shut.

    Args:
        run: its options, checked here before anything else.
        selection: the type of the callback, which takes a :class:`.GatedNetwork` and ``options``.
        training: options of ``train``.
    """
    removal: dict[str, Any] = {
        "remove_below": run.remove_below,
        "remove_every": run.remove_every,
        "target": run.target,
    }
    start = {"start": run.start, "gate_lr": run.gate_lr, **options}
    known = [(selection, {"gate": gate.settings(), **removal, **start})]
    callbacks = run.check(model, dataset, training, known)
    small, report = factorized(
        run.name,
        model,
        rank=run.rank,
        format=run.format,
        preset=run.preset,
        layers=run.layers,
        exclude=run.exclude,
        start=run.start,
        seed=run.seed,
        example_inputs=run.example_inputs,
    )
    before = {entry.name: entry.rank for entry in report.replaced}
    network = GatedNetwork(small, gate, report.parameters_before, layers=before, seed=run.seed)
    first = network.sizes
    if run.target is not None and gate.begins_open and network.ratio() >= run.target:
        warn(
            f"{run.name}: with these first ranks the network is {network.ratio():.1f} times smaller already, "
            f"target {run.target:g}: gates are frozen from the beginning; larger ranks leave them a choice",
        )
    begun = {**start, "layers": structures(small, report)}
    method = selection(network, **removal, start=begun, **options)
    gates = {id(location) for location in network.locations}
    weights = [p for p in small.parameters() if p.requires_grad and id(p) not in gates]
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": network.locations, "lr": run.lr * run.gate_lr, "weight_decay": 0.0},
    ]
    history = train(
        small,
        dataset,
        lr=run.lr,
        weight_decay=run.weight_decay,
        seed=run.seed,
        parameters=groups,
        callbacks=[method, *callbacks],
        **training,
    ).history
    count, frozen = network.count_gates(), network.frozen
    if run.target is not None and not frozen:
        warn(
            f"{run.name}: target {run.target:g} was not reached: the network is {network.ratio():.1f} times "
            "smaller; more epochs, a stronger penalty or a larger gate_lr shut more gates",
        )
    if training["epochs"] and run.target is None and network.ranks() == first:
        warn(
            f"{run.name}: no rank was cut in {training['epochs']} epochs: a step moves a gate by about lr "
            f"times gate_lr, here {run.lr * run.gate_lr:g}; more epochs, a larger gate_lr or a stronger "
            "penalty cut ranks"
        )
    network.fold()
    recount(report, small, run.example_inputs)
    report.details[run.name] = {
        "ranks_before": before,
        "ranks_after": {entry.name: entry.rank for entry in report.replaced},
        "ratio": report.model_ratio,
        "gates": count,
        "ratio_with_gates": report.parameters_before / (report.parameters_after + count),
        "frozen": frozen,
    }
    return RecipeResult(small, report, history)
