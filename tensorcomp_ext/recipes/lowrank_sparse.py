"""Low-rank + sparse compression from a trained network to a packed one, and what it is compared with."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.formats._sparse import SparseFormat
from tensorcomp_ext.formats.lowrank_sparse import MODES
from tensorcomp_ext.nn import FactorizedLayer

from .callbacks import Callback
from .decisions import Begun, check_attached, check_training
from .distillation import Direction, Distillation
from .options import check_choice, check_number
from .prepare import checked_callbacks
from .pruning import CRITERIA, Criterion, GlobalPruner, GradualPruning
from .recount import recount
from .settings import Epoch
from .sparse_start import METHODS, LowRank, Method, parts_of
from .sparsity import SPARSITY_SCHEDULES
from .task import Task
from .train import train

BINS = 40


class LowRankSparseResult(NamedTuple):
    """The compressed network, what was done to each layer, and the training history.

    ``report.details["lowrank_sparse"]`` has what is stored of the compressed layers: ``weights``, the dense
    ones; ``low_rank`` and ``sparse``, factors and entries; ``stored``, both, as publications count;
    ``stored_bytes``, with what says where entries belong; ``sparsity`` of the sparse parts. ``histograms``
    has those of each layer's weights before and after, between ``-limit`` and ``limit``, the largest of the
    dense ones; what lies beyond counts in the outermost bins.
    """

    model: nn.Module
    report: Report
    history: list[Epoch]


def lowrank_sparse(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    method: Method = "lowrank-sparse",
    low_rank: LowRank = "tt",
    mode: str = "additive",
    init: str = "residual",
    fraction: float = 0.1,
    sparsity: float = 0.9,
    storage: float | None = None,
    epochs: int = 50,
    prune_epochs: int | None = None,
    sparsity_schedule: str = "slow-start",
    criterion: Criterion = "magnitude",
    alpha: float = 0.9,
    temperature: float = 3.0,
    direction: Direction = "teacher-student",
    iterations: int = 300,
    exclude: str | Iterable[str] | None = None,
    example_inputs: Any = None,
    lr: float = 0.1,
    schedule: str = "decay",
    weight_decay: float = 0.0,
    callbacks: Iterable[Callback] = (),
    **training: Any,
) -> LowRankSparseResult:
    """Decompose, prune the sparse parts gradually while the network learns from what it was, and pack.

    For each layer ``L = fit(A)`` with a budget of ``fraction`` and ``S = A - L``, so that training begins
    with the outputs of ``model``. Before epoch t the share ``s_t`` of all S together that is smallest is
    masked. The loss is ``alpha CE + (1 - alpha) T^2 KL`` against ``model``. Biases, normalisation and the
    last layer stay dense.

    Args:
        model: trained; it is not changed, and is the teacher.
        dataset: to train on; ``data.load`` reads some, any uint8 images make a ``data.Dataset``, and what is
            no image is a :class:`.Task`.
        method: "lowrank-sparse"; or, to compare with, "sparse" (no L, pruned and trained in the same way) or
            "lowrank" (no S: decomposed and trained in the same way).
        low_rank, mode, init, fraction, iterations, exclude, example_inputs: as :func:`.parts_of`.
        sparsity: of S at the end. What is stored is ``|L| + nnz(S)``: to store as much as pruning alone does,
            low-rank + sparse needs a sparsity higher by ``fraction``.
        storage: instead of ``sparsity`` and, for "lowrank", of ``fraction``: share of the compressed
            layers' weights that is stored in the end, L included, indices not.
        epochs: of training; the first ``prune_epochs`` of them until the sparsity is reached (None: all).
        sparsity_schedule: "slow-start", ``s_f (t / n)^3``, or "zhu-gupta".
        criterion: which entries are small: by "magnitude" of S, or by the "difference" of S and L.
        alpha, temperature, direction: of :class:`.Distillation`.
        lr, schedule, weight_decay, callbacks, training: as :func:`.train` takes them; with ``checkpoint`` a
            killed run goes on where it was.

    Raises:
        ValueError, TypeError: options that do not fit, and as ``train`` and ``compress``; a ``storage`` that
            L alone exceeds.

    Source: Hawkins et al. 2021 (low-rank + sparse tensor compression), Algorithm 1.
    """
    name = "lowrank_sparse"
    training |= {"lr": lr, "schedule": schedule, "weight_decay": weight_decay}
    check_training(name, dataset, epochs, training, model=model)
    callbacks = checked_callbacks(name, callbacks)
    check_choice(name, "method", method, METHODS)
    check_choice(name, "mode", mode, MODES)
    check_choice(name, "init", init, ("residual", "masking"))
    check_choice(name, "sparsity_schedule", sparsity_schedule, SPARSITY_SCHEDULES)
    check_choice(name, "criterion", criterion, CRITERIA)
    check_number(name, "sparsity", sparsity, 0, 1, "[0, 1)")
    check_number(name, "fraction", fraction, 0, 1, "(0, 1]")
    check_number(name, "iterations", iterations, 1, math.inf, "[1, inf)", int)
    if prune_epochs is not None:
        last = max(epochs, 1)
        check_number(name, "prune_epochs", prune_epochs, 1, last, f"[1, epochs] = [1, {last}]", int)
    if storage is not None:
        check_number(name, "storage", storage, 0, 1, "(0, 1]")
        fraction = storage if method == "lowrank" else fraction
    # What S will hold in the end: of what is stored, what L leaves.
    left = 1.0 - sparsity if storage is None else storage - fraction
    if method == "lowrank-sparse" and init == "masking" and not 0.0 < left < 1.0:
        raise ValueError(
            "lowrank_sparse: init='masking' fits L to what S will not hold: the share S keeps must be in "
            f"(0, 1), got {left:.4g} from {'sparsity' if storage is None else 'storage'}"
        )
    outliers = min(max(left, 1e-6), 1 - 1e-6)  # a number that is not used must be sound, too
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    taught = Distillation(teacher, alpha=alpha, temperature=temperature, direction=direction)
    begun: dict[str, Any] = {"method": method, "mode": mode, "init": init, "fraction": fraction}
    begun["low_rank"] = dict(low_rank) if isinstance(low_rank, Mapping) else low_rank
    begun |= {"outliers": outliers, "iterations": iterations}
    attached: list[Callback] = [taught, Begun(begun)]
    check_attached(training.get("checkpoint"), [*attached, *callbacks])
    result = parts_of(
        model,
        method=method,
        low_rank=low_rank,
        mode=mode,
        init=init,
        fraction=fraction,
        outliers=outliers,
        iterations=iterations,
        storage=storage,
        exclude=exclude,
        example_inputs=example_inputs,
    )
    small, report = result
    before = _histograms(small, teacher, report)
    if method != "lowrank":
        pruner = GlobalPruner(small, criterion=criterion)
        final = sparsity if storage is None else _sparsity_for(storage, small, pruner)
        over = epochs if prune_epochs is None else prune_epochs
        attached.append(GradualPruning(pruner, final, max(1, over), schedule=sparsity_schedule))
        if epochs == 0:
            pruner.prune(final)
    history = train(
        small,
        dataset,
        epochs=epochs,
        callbacks=[*attached, *callbacks],
        **training,
    ).history
    finalize(small)
    recount(report, small, example_inputs, teacher)
    report.details["lowrank_sparse"] = {"method": method, **stored(small)}
    report.details["histograms"] = _histograms(small, teacher, report, before)
    return LowRankSparseResult(small, report, history)


def finalize(model: nn.Module) -> nn.Module:
    """Pack every layer of ``model`` that has another form for training, in place; returns the model."""
    for layer in layers_of(model).values():
        layer.finalize()
    return model


def layers_of(model: nn.Module) -> dict[str, FactorizedLayer]:
    """The factorised layers of a network by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FactorizedLayer)}


def stored(model: nn.Module) -> dict[str, Any]:
    """What the factorised layers of a network store; see :class:`LowRankSparseResult`."""
    weights = [layer.weight for layer in layers_of(model).values()]
    sparse = [weight for weight in weights if isinstance(weight, SparseFormat)]
    dense, entries = sum(w.shape.numel() for w in weights), sum(w.nnz for w in sparse)
    within = sum(w.shape.numel() for w in sparse)
    total = sum(w.counted for w in weights)
    return {
        "weights": dense,
        "low_rank": total - entries,
        "sparse": entries,
        "stored": total,
        "stored_bytes": sum(w.stored_bytes for w in weights),
        "sparsity": 1.0 - entries / within if within else None,
    }


def _sparsity_for(storage: float, model: nn.Module, pruner: GlobalPruner) -> float:
    """Sparsity of S at which factors and entries are ``storage`` of the dense weights."""
    found = stored(model)
    entries = storage * found["weights"] - found["low_rank"]
    if entries < 0:
        raise ValueError(
            f"lowrank_sparse: storage must be at least {found['low_rank'] / found['weights']:.4f}, which the "
            f"low-rank parts take, got {storage}"
        )
    return 1.0 - entries / pruner.numel


def _dense_weight(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


@torch.no_grad()
def _histograms(
    model: nn.Module, dense: nn.Module, report: Report, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Counts of weights in equal bins: of the dense layers, and with those as ``before`` of the new ones."""
    layers, found = layers_of(model), {}
    for entry in report.replaced:
        if before is None:
            weight = _dense_weight(dense, entry.name).detach().float().cpu()
            limit = float(weight.abs().max()) or 1.0
            counts = torch.histc(weight, BINS, -limit, limit)
            found[entry.name] = {"limit": limit, "before": [int(c) for c in counts]}
        else:
            kept = before[entry.name]
            weight = layers[entry.name].weight.to_dense().float().cpu()
            limit = kept["limit"]
            counts = torch.histc(weight.clamp(-limit, limit), BINS, -limit, limit)
            found[entry.name] = {**kept, "after": [int(c) for c in counts]}
    return found
