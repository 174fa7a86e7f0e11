"""Factorised networks of one given rank, trained as they are: what rank selection is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tensorcomp_ext.data import Dataset

from .callbacks import Callback
from .decisions import Begun, checked_run
from .recount import recount
from .result import RecipeResult
from .start import check_start, factorized, structures
from .task import Task
from .train import train


def uniform(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    rank: Any = 10,
    format: Any = None,
    preset: str | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    start: str = "random",
    example_inputs: Any = None,
    epochs: int = 150,
    lr: float = 5e-4,
    optimizer: str = "adam",
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    seed: int = 0,
    callbacks: Iterable[Callback] = (),
    **training: Any,
) -> RecipeResult:
    """Train a factorised network, with the ranks that it is given, from scratch or from trained weights.

    With tensor rings and one rank throughout, the tensor ring networks of Wang et al. 2018.

    Args:
        rank: as ``compress`` takes it.
        model, dataset, format, preset, layers, exclude, start, example_inputs, epochs, lr, optimizer,
            schedule, weight_decay, seed, callbacks, training: as :func:`.l0` takes them.

    Raises:
        ValueError, TypeError: options that do not fit, before any work; and as ``train`` and ``compress``.

    Source: Wang et al. 2018 (TRN); Novikov et al. 2015 (TT).
    """
    check_start("uniform", start)
    training |= {"optimizer": optimizer, "schedule": schedule, "lr": lr}
    training |= {"weight_decay": weight_decay, "seed": seed}
    checks: dict[str, Any] = {"callbacks": callbacks, "known": [(Begun, {"start": start})]}
    callbacks = checked_run("uniform", dataset, epochs, training, model=model, **checks)
    small, report = factorized(
        "uniform",
        model,
        rank=rank,
        format=format,
        preset=preset,
        layers=layers,
        exclude=exclude,
        start=start,
        seed=seed,
        example_inputs=example_inputs,
    )
    ranks = {entry.name: list(entry.rank or ()) for entry in report.replaced}
    begun = Begun({"start": start, "ranks": ranks, "layers": structures(small, report)})
    history = train(small, dataset, epochs=epochs, callbacks=[begun, *callbacks], **training).history
    recount(report, small, example_inputs)
    report.details["uniform"] = {"ranks": ranks, "ratio": report.model_ratio}
    return RecipeResult(small, report, history)
