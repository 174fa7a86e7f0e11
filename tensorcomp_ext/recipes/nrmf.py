"""NRMF: train under a norm that lowers energy and ranks, then decompose once and fine-tune."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tensorcomp_ext._warnings import warn
from tensorcomp_ext.data import Dataset

from .callbacks import Callback
from .checkpoint import read_checkpoint
from .decisions import Begun, check_attached, check_training, decomposed_at
from .nuclear_norm import Norm, NuclearNorm
from .options import check_number
from .prepare import checked_callbacks
from .recount import recount
from .result import RecipeResult
from .settings import Epoch
from .task import Task
from .train import train


def nrmf(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    alpha: float = 1e-2,
    p: float = 0.95,
    norm: Norm = "frobenius",
    epochs: int = 20,
    finetune_epochs: int = 10,
    lr: float = 0.01,
    finetune_lr: float = 0.001,
    schedule: str = "cosine",
    weight_decay: float = 5e-4,
    exclude: str | Iterable[str] = (),
    example_inputs: Any = None,
    callbacks: Iterable[Callback] = (),
    checkpoint: str | Path | None = None,
    logs: str | Path | None = None,
    **training: Any,
) -> RecipeResult:
    """Minimise ``loss + alpha L_n``, take the ranks that keep the energy p, decompose in Tucker-2, fine-tune.

    Ranks are elastic: they follow the spectra of the convolutions as these are trained, and every epoch's
    line in the history has them (``extra["nuclear_norm"]``, see :class:`.NuclearNorm`); the network is
    decomposed once, at the end. The norm is on convolutions with a window; other layers stay dense. ``L_n``
    is L2 decay itself, so the optimizer's ``weight_decay`` is not applied to these weights in the first
    phase: it applies to the other parameters only. While fine-tuning it applies to all.

    Args:
        model: trained or fresh; it is not changed.
        dataset: to train on.
        alpha: weight of the norm; 0 trains without. The source gives none: 1e-3 to 1e-1 are worth trying.
        p: share of the energy of each unfolding that its rank keeps.
        norm: "frobenius", the norm of the source, or "nuclear", the sum of singular values.
        epochs, lr: of the first phase.
        finetune_epochs, finetune_lr: of the second, on the decomposed network.
        exclude: patterns of layers to leave alone.
        example_inputs: as ``compress`` takes them.
        checkpoint: of the first phase; that of the second lies beside it, ``.finetune`` before its suffix. A
            killed run goes on in the phase in which it was.
        logs: folder; the phases write to ``regularised`` and ``finetune`` in it.
        schedule, weight_decay, callbacks, training: as :func:`.train` takes them, for both phases; callbacks
            for the first one only, whose network they know.

    Returns:
        The history has both phases, ``extra["phase"]`` says which; ``report.details["nrmf"]`` the options.

    Raises:
        ValueError, TypeError: options out of range, a network without a convolution with a window, NaN or Inf
            in a weight, and as ``train``; all before any work.

    Source: Exploiting Elasticity in Tensor Ranks for Compressing Neural Networks (NRMF).
    """
    shared = {"schedule": schedule, "weight_decay": weight_decay, **training}
    check_number("nrmf", "finetune_lr", finetune_lr, 0.0, float("inf"), "[0, inf)")
    places: dict[str, Any] = {"checkpoint": checkpoint, "logs": logs}
    check_training("nrmf", dataset, epochs, {"lr": lr, **places, **shared}, model=model)
    if checkpoint is not None:
        places["checkpoint"] = second_checkpoint(checkpoint)
    own = {"lr": finetune_lr, **places, **shared}
    unseen = None if epochs else model
    check_training("nrmf", dataset, finetune_epochs, own, option="finetune_epochs", model=unseen)
    callbacks = checked_callbacks("nrmf", callbacks)
    dense = copy.deepcopy(model)
    regulariser = NuclearNorm(dense, alpha, norm=norm, p=p, exclude=exclude)
    begun = {"recipe": "nrmf", "finetune_epochs": finetune_epochs, "finetune_lr": finetune_lr}
    last = Begun({**begun, **regulariser.settings()})
    if checkpoint is not None:
        check_attached(checkpoint, [regulariser, Begun(begun), *callbacks])
        check_attached(places["checkpoint"], [last])
        _check_stale(Path(checkpoint), epochs)
    first = train(
        dense,
        dataset,
        epochs=epochs,
        lr=lr,
        parameters=_groups(dense, regulariser.weights),
        callbacks=[regulariser, Begun(begun), *callbacks],
        checkpoint=checkpoint,
        logs=None if logs is None else Path(logs) / "regularised",
        **shared,
    )
    ranks = regulariser.ranks()
    if not any(ranks.values()):
        warn(
            f"nrmf: no layer gets smaller at p={p}; the network stays dense (a larger alpha lowers ranks)",
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "compress: nothing was replaced")
        small, report = decomposed_at(
            dense,
            ranks,
            exclude=exclude,
            example_inputs=example_inputs,
            others="nrmf decomposes convolutions with a window",
        )
    second = train(
        small,
        dataset,
        epochs=finetune_epochs,
        lr=finetune_lr,
        callbacks=[last],
        checkpoint=places["checkpoint"],
        logs=None if logs is None else Path(logs) / "finetune",
        **shared,
    )
    recount(report, small, example_inputs, model)
    report.details["nrmf"] = {
        **regulariser.settings(),
        "ranks": {name: None if found is None else list(found) for name, found in ranks.items()},
        "weight_decay": f"{weight_decay:g}, in the first phase on the other parameters only",
    }
    return RecipeResult(small, report, phases({"regularised": first.history, "finetune": second.history}))


def second_checkpoint(checkpoint: str | Path) -> Path:
    """``run.ckpt`` to ``run.finetune.ckpt``."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}.finetune{path.suffix}")


def _check_stale(checkpoint: Path, epochs: int) -> None:
    """Refuse a checkpoint of the second phase that is of another run than the first phase to be trained."""
    second = second_checkpoint(checkpoint)
    if not epochs or not second.exists():
        return
    done = len(read_checkpoint(checkpoint)["history"]) if checkpoint.exists() else 0
    if done < epochs:
        raise ValueError(
            f"nrmf: checkpoint {second} is of another run, as in {checkpoint}, the first phase, {done} of "
            f"{epochs} epochs are done; remove it to begin again"
        )


def phases(histories: Mapping[str, Sequence[Epoch]]) -> list[Epoch]:
    """One history of several, epochs counted on, each with the name of its phase."""
    found: list[Epoch] = []
    for phase, history in histories.items():
        before = len(found)
        for entry in history:
            extra = {**entry.extra, "phase": phase}
            found.append(replace(entry, epoch=before + entry.epoch, extra=extra))
    return found


def _groups(model: nn.Module, weights: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Optimiser groups: regularised weights have no decay beside the norm."""
    chosen = {id(weight) for weight in weights}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) in chosen], "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) not in chosen]},
    ]
    return [group for group in groups if group["params"]]
