"""Post-training compression: ranks from the trained weights, batch normalisation refreshed, fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorcomp_ext.compress import CompressionResult, compress
from tensorcomp_ext.compress.atomic import replacing
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.plan import export_choices, import_choices
from tensorcomp_ext.ranks import Latency, RankSpec, parse_rank

from . import processes
from .callbacks import Callback
from .decisions import Begun, checked_run
from .normalization import recalibrate_batchnorm, unaugmented
from .recount import recount
from .result import RecipeResult
from .settings import Epoch
from .task import Task, as_task
from .train import FINETUNING, train

CALIBRATION_BATCH = 64


def posttraining(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    rank: RankSpec = "vbmf",
    format: Any = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    example_inputs: Any = None,
    batch: int = 64,
    calibration: int = 256,
    recalibrate: bool = True,
    epochs: int = 0,
    lr: float = 0.01,
    seed: int = 0,
    callbacks: Iterable[Callback] = (),
    **training: Any,
) -> RecipeResult:
    """Decompose a trained network at ranks that a rule chooses, refresh batch normalisation, and fine-tune.

    Nothing but training examples is looked at. With ``rank="latency:2.0"`` ranks are those with which the
    network is measured twice as fast on this machine, at the least error of the layers' outputs on the first
    training examples.

    Args:
        model: trained; it is not changed.
        dataset: to calibrate and train on.
        rank: as ``compress`` takes it: "vbmf", "energy:0.95", "latency:2.0", "network-params:0.3" and others.
        format, layers, exclude: as ``compress`` takes them.
        example_inputs: what costs are counted and latencies measured on; None for the first ``batch``
            training examples.
        calibration: of how many training examples, the first ones, a latency rule weighs errors with what the
            layers read; 0 weighs the weights alone. Not used by other rules, nor by one with batches of its
            own.
        recalibrate: measure the statistics of batch normalisation again, on training examples; see
            :func:`.recalibrate_batchnorm`.
        epochs, lr, callbacks, training: as :func:`.finetune` takes them; no epochs, no training.
        seed: of training and of the examples that normalisation is measured on.

    With ``checkpoint`` a killed run goes on where it was; measured ranks and tuned plans are kept in a file
    beside it, ``.ranks`` after its name, as they would not be measured the same again.

    Returns:
        ``report.details["posttraining"]`` has the options; of a latency rule ``["latency_rule"]`` what was
        measured.

    Raises:
        ValueError, TypeError: options out of range, before any work; a latency rule in several processes,
            which would measure different ranks; and as ``compress`` and ``train``.

    Source: Kim et al. 2016 (EVBMF ranks, Tucker-2, fine-tuned).
    """
    name = "posttraining"
    training = {**FINETUNING, **training, "lr": lr, "seed": seed}
    known: dict[str, Any] = {"known": [(Begun, {"recipe": name})], "trains": bool(epochs)}
    callbacks = checked_run(name, dataset, epochs, training, model=model, callbacks=callbacks, **known)
    for option, value, least in (("batch", batch, 1), ("calibration", calibration, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"posttraining: {option} must be an int of at least {least}, got {value!r}")
    if not isinstance(recalibrate, bool):
        raise TypeError(f"posttraining: recalibrate must be a bool, got {recalibrate!r}")
    images = {
        key: training[key] for key in ("augment", "label_smoothing", "channels_last") if key in training
    }
    task = as_task("posttraining", dataset, **images)
    if not epochs:  # with epochs it has been asked already
        task.check(name, model)
    spec = parse_rank(rank) if isinstance(rank, str) else rank
    rule = spec if isinstance(spec, Latency) else None
    if rule is not None and processes.count() > 1:
        raise ValueError(
            "posttraining: a latency rule measures in one process only: choose ranks before, in one"
        )
    inputs = _first(task, model, batch) if example_inputs is None else example_inputs
    kept = None if rule is None else _ranks_file(training.get("checkpoint"))
    begun = None if kept is None else _read(kept, training["checkpoint"])
    if rule is not None and rule.calibration is None and calibration and begun is None:
        spec = replace(rule, calibration=_batches(task, model, calibration))
    result = _compressed(model, spec if begun is None else begun["ranks"], format, layers, exclude, inputs)
    small, report = result
    if begun is not None:
        report.details |= begun["details"]
        import_choices(small, begun["plans"])
        for entry in report.layers:
            entry.skipped = begun["skipped"].get(entry.name)  # by ranks alone it would be for having none
    ranks = {entry.name: None if entry.rank is None else list(entry.rank) for entry in report.layers}
    if kept is not None and begun is None:
        chosen = {"ranks": ranks, "skipped": {entry.name: entry.skipped for entry in report.layers}}
        _write(kept, {**chosen, "plans": export_choices(small), "details": report.details})
    norms = 0
    if recalibrate:
        norms = recalibrate_batchnorm(small, task, seed=seed)
    history: list[Epoch] = []
    if epochs:
        # What was measured is read from a file when a run goes on: another rule must not get its ranks.
        asked = None if rule is None else {**rule.to_config(), "calibration": calibration}
        attached = [Begun({"recipe": name, "ranks": ranks, "rule": asked}), *callbacks]
        history = train(small, dataset, epochs=epochs, callbacks=attached, **training).history
        recount(report, small, inputs, model)
    report.details["posttraining"] = {
        "rank": rank if isinstance(rank, str) else str(spec),
        "calibration": calibration if rule is not None and rule.calibration is None else 0,
        "recalibrated": norms,
        "epochs": epochs,
    }
    return RecipeResult(small, report, history)


def _compressed(
    model: nn.Module, rank: Any, format: Any, layers: Any, exclude: Any, inputs: Any
) -> CompressionResult:
    if isinstance(rank, Mapping):
        rank = {name: tuple(r) if isinstance(r, list) else r for name, r in rank.items() if r is not None}
    return compress(model, format, rank, inputs, layers, exclude)


def _first(task: Task, model: nn.Module, count: int, start: int = 0) -> tuple[torch.Tensor, ...]:
    """The training examples ``start`` to ``count`` as the network reads them, images as they are."""
    wanted = torch.arange(start, min(count, task.size))
    return unaugmented(task).batch_for(model, wanted, torch.Generator().manual_seed(0)).inputs


def _batches(task: Task, model: nn.Module, count: int) -> list[tuple[torch.Tensor, ...]]:
    task, whole = unaugmented(task), min(count, task.size)  # one task, which may keep images on a device
    return [
        _first(task, model, min(start + CALIBRATION_BATCH, whole), start)
        for start in range(0, whole, CALIBRATION_BATCH)
    ]


def _ranks_file(checkpoint: str | Path | None) -> Path | None:
    return None if checkpoint is None else Path(f"{checkpoint}.ranks")


def _read(path: Path, checkpoint: str | Path) -> dict[str, Any] | None:
    """What a killed run had chosen; None where there is nothing to go on with."""
    if not Path(checkpoint).exists():
        return None
    try:
        found = json.loads(path.read_text())
        found = {key: found[key] for key in ("ranks", "skipped", "plans", "details")}
        if not all(isinstance(value, dict) for value in found.values()):
            raise TypeError("not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"posttraining: {path}, the ranks of the run in {checkpoint}, cannot be read ({error}); remove "
            "the checkpoint to begin again"
        ) from error
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as written:
        written.write_text(json.dumps(content))
