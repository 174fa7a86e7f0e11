"""Decompose and fine-tune: what methods that train while they compress are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tensorcomp_ext.compress import CompressionResult, compress
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.formats import PackedLowRankSparse
from tensorcomp_ext.ranks import VBMF, Ratio, rank_layout
from tensorcomp_ext.ranks.layouts import Pixels, Ranks

from .adaptive_ranks import first_ranks
from .callbacks import Callback
from .decisions import Begun, checked_run, compressible, decomposed_at, same_ranks
from .lowrank_sparse import layers_of
from .options import check_choice, check_number
from .recount import recount
from .result import RecipeResult
from .task import Task
from .train import train

FORMATS: dict[str, Any] = {
    # A kernel as the matrix [T, S K] in two factors, which is a packed weight without a sparse part.
    "tsvd": ("lowrank_sparse_packed", {"low_rank": "svd", "nnz": 0}),
    "cp": "cp",
    "tucker": "tucker",
    "tucker2": "tucker2",
    "tt": "tt",
    "tr": "tr",
}
"""Of the methods with uniform ranks the format of convolutions; linear layers take "svd"."""
METHODS = (*FORMATS, "energy", "vbmf")


def decompose_finetune(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    method: str = "tucker2",
    target: float | None = 0.1,
    epochs: int = 20,
    lr: float = 0.01,
    schedule: str = "cosine",
    weight_decay: float = 1e-4,
    exclude: str | Iterable[str] = (),
    example_inputs: Any = None,
    callbacks: Iterable[Callback] = (),
    **training: Any,
) -> RecipeResult:
    """Decompose a trained network at once, at ranks that do not change, and train the factors.

    Args:
        model: trained; it is not changed.
        dataset: to train on.
        method: "tsvd" (kernels unfolded to matrices), "cp", "tucker", "tucker2", "tt" or "tr": uniform ranks,
            the largest with which a layer stores ``target`` of its weights, of small layers rank 1. "energy":
            "tucker2" at one energy threshold for all layers. "vbmf": "tucker2" at the ranks of EVBMF.
            Linear layers are decomposed by SVD in all of them.
        target: share of the weights of all layers that can be compressed that is stored, biases not counted;
            None for "vbmf", which chooses its size itself.
        exclude: patterns of layers to leave dense; they do not count.
        example_inputs: as ``compress`` takes them.
        epochs, lr, schedule, weight_decay, callbacks, training: as :func:`.train` takes them; with
            ``checkpoint`` a killed run goes on where it was.

    Returns:
        ``report.details["decompose_finetune"]`` has ``method``, ``target``, the ``weights`` of the
        compressible layers, ``stored`` of them and their share.

    Raises:
        ValueError, TypeError: options out of range, a network without a layer to compress, a target that
            rank 1 exceeds with "energy", NaN or Inf in a weight, and as ``train``; all before any work.

    Source: Kim et al. 2016 (Tucker-2 at EVBMF ranks, fine-tuned); Lebedev et al. 2015 (CP).
    """
    name = "decompose_finetune"
    check_choice(name, "method", method, METHODS)
    if method == "vbmf" and target is not None:
        raise ValueError(f"{name}: target must be None with method 'vbmf', which has ranks of its own")
    if method != "vbmf":
        check_number(name, "target", target, 0.0, 1.0, "(0, 1)")
    options = {"lr": lr, "schedule": schedule, "weight_decay": weight_decay, **training}
    begun = Begun({"recipe": name, "method": method, "target": target})
    known = [(Begun, begun.settings())]
    callbacks = checked_run(name, dataset, epochs, options, model=model, callbacks=callbacks, known=known)
    layers = compressible(name, model, exclude, example_inputs=example_inputs)
    weights: dict[str, Any] = {place: layer.weight for place, layer in layers.items()}
    small, report = _decomposed(model, weights, method, target, exclude, example_inputs)
    history = train(small, dataset, epochs=epochs, callbacks=[begun, *callbacks], **options).history
    recount(report, small, example_inputs, model)
    factors = layers_of(small)
    stored = sum(
        factors[place].weight.counted if place in factors else weight.numel()
        for place, weight in weights.items()
    )
    total = sum(weight.numel() for weight in weights.values())
    details = {"method": method, "target": target, "weights": total, "stored": stored}
    report.details[name] = {**details, "stored_share": stored / total}
    return RecipeResult(small, report, history)


def _decomposed(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    method: str,
    target: float | None,
    exclude: str | Iterable[str],
    example_inputs: Any,
) -> CompressionResult:
    others = "not called, or not compressible"
    if method in FORMATS:
        assert target is not None
        kernels = {place: FORMATS[method] for place, weight in weights.items() if weight.dim() > 2}
        result = compress(
            model,
            format=kernels,
            rank={place: Ratio(target) for place in weights},
            exclude=exclude,
            example_inputs=example_inputs,
        )
        for entry in result.report.skipped:
            if entry.skipped == "no rank pattern fits":
                entry.skipped = others
        for weight in result.model.modules():
            if isinstance(weight, PackedLowRankSparse):
                weight.values.requires_grad_(
                    False
                )  # of no entries, whose gradient several processes would await
        return result
    if method == "energy":
        assert target is not None
        ranks, _ = first_ranks("decompose_finetune", model, weights, target)
    else:
        ranks = same_ranks(
            model, lambda: _vbmf(weights), {p: 1 if w.dim() == 2 else 2 for p, w in weights.items()}
        )
    return decomposed_at(model, ranks, exclude=exclude, example_inputs=example_inputs, others=others)


def _vbmf(weights: Mapping[str, Tensor]) -> dict[str, Ranks | None]:
    found: dict[str, Ranks | None] = {}
    for place, weight in weights.items():
        layout = rank_layout(weight.detach(), "svd" if weight.dim() == 2 else "tucker2")
        ranks = VBMF().choose(layout, Pixels())
        found[place] = ranks if layout.params(ranks) < layout.numel else None
    return found
