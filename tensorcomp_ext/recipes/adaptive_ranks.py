"""Cutting the ranks of factorized layers in training, all under one energy threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tensorcomp_ext.formats import Format, Tucker2
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.plan.memory_format import applies_channels_last, as_channels_last
from tensorcomp_ext.ranks import Orthogonal, rank_layout
from tensorcomp_ext.ranks.layouts import Ranks
from tensorcomp_ext.ranks.shared_energy import Subject, share_energy

from .decisions import same_ranks
from .exchange import exchange


def ranks_of(weight: Format) -> Ranks:
    """The ranks of a weight as a tuple."""
    return (weight.rank,) if isinstance(weight.rank, int) else tuple(weight.rank)


def size_of(layers: Mapping[str, FactorizedLayer]) -> int:
    """Weights that layers store, without biases."""
    return sum(layer.weight.numel for layer in layers.values())


def first_ranks(
    name: str, model: nn.Module, weights: Mapping[str, Tensor], target: float, start: float = 1.0
) -> tuple[dict[str, Ranks | None], int]:
    """Ranks of dense weights at one energy threshold, None for layers that stay dense, and a final budget.

    Which layers stay dense is decided at the final size; the others' ranks are those at ``start`` times the
    size that is left for them, and none begins as large as its dense weight.

    Args:
        name: of the recipe, for messages.
        weights: kernels for "tucker2" and matrices for "svd", by layer.
        target: share of all these weights to store in the end, those of layers that stay dense included.

    Returns:
        Ranks by layer, the same in all processes, and how many weights the factorized layers may store in
        the end.

    Raises:
        ValueError: a target that rank 1 exceeds.
    """
    layouts = {
        place: rank_layout(weight.detach(), "svd" if weight.dim() == 2 else "tucker2")
        for place, weight in weights.items()
    }
    total = sum(layout.numel for layout in layouts.values())
    budget = int(target * total)
    sizes = [(layout.params((1,) * len(layout.names)), layout.numel) for layout in layouts.values()]
    least = sum(map(min, sizes))
    if least > budget:
        raise ValueError(
            f"{name}: target must be at least {least / total:.4f}, which rank 1 takes, got {target}"
        )

    def choose() -> dict[str, Ranks | None]:
        subjects = {place: Subject(layout, layout.params, layout.numel) for place, layout in layouts.items()}
        final = _shared(subjects, budget)
        rest = {
            place: Subject(layouts[place], layouts[place].params, ceiling=layouts[place].numel)
            for place in layouts
            if final[place]
        }
        dense = sum(layout.numel for place, layout in layouts.items() if place not in rest)
        first: dict[str, Ranks | None] = dict.fromkeys(layouts)
        return first | _shared(rest, int(start * (budget - dense)))

    ranks = same_ranks(model, choose, {place: len(layout.names) for place, layout in layouts.items()})
    return ranks, budget - sum(layouts[place].numel for place, found in ranks.items() if found is None)


def cut_to(
    model: nn.Module,
    layers: Mapping[str, FactorizedLayer],
    budget: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[str]:
    """Cut the ranks of layers until they fit a budget together, by the spectra of their weights as they are.

    Each factor is orthogonalised and its triangle absorbed by the core, whose unfoldings have the spectra of
    the dense weight; see :class:`..ranks.Orthogonal`. Ranks keep one share of energy, the same for all
    layers but those it would make as large as they are dense, and what the budget then leaves goes to single
    ones; they never grow. What an optimizer remembers
    of layers that are cut is dropped, as their bases turn; other layers are left as they are. Of several
    processes the first decides.

    Args:
        model: that has the layers, in formats "tucker2" and "svd".
        budget: weights that all layers may store, without biases.
        optimizer: of the layers' parameters, or None.

    Returns:
        Names of the layers that were cut; none where all fit already.

    Raises:
        ValueError: a budget that rank 1 exceeds, NaN or Inf in the factors.
        RuntimeError: another process failed.
    """
    if size_of(layers) <= budget:
        return []
    made: dict[str, Orthogonal] = {}

    def choose() -> dict[str, Ranks | None]:
        for name, layer in layers.items():
            made[name] = Orthogonal(layer.weight)
        layouts = {name: found.layout for name, found in made.items()}
        subjects = {
            name: Subject(layout, layout.params, ceiling=layout.numel) for name, layout in layouts.items()
        }
        return _shared(subjects, budget)

    sizes = {name: len(ranks_of(layer.weight)) for name, layer in layers.items()}
    cut = []
    for name, ranks in same_ranks(model, choose, sizes).items():
        layer = layers[name]
        if ranks is None or ranks == ranks_of(layer.weight):
            continue
        found = made[name] if name in made else Orthogonal(layer.weight)
        replace_weight(layer, found.truncated(ranks), optimizer)
        cut.append(name)
    return cut


def resize(
    layer: FactorizedLayer, ranks: Sequence[int], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Give a layer factors of other ranks, not initialised, for weights that are about to be loaded."""
    weight = layer.weight
    if tuple(ranks) == ranks_of(weight):
        return
    like = weight.factors[0]
    made = type(weight).empty(weight.shape, tuple(ranks), device=like.device, dtype=like.dtype)
    replace_weight(layer, made, optimizer)


def replace_weight(
    layer: FactorizedLayer, weight: Format, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a weight of other ranks in the place of a layer's; the optimizer forgets what it kept of that."""
    former = layer.weight
    if isinstance(weight, Tucker2) and isinstance(former, Tucker2) and applies_channels_last(former.core):
        # As the network was converted: a resumed run, which is converted anew, must not round otherwise.
        weight.core.data = as_channels_last(weight.core.data)
    pairs = list(zip(former.parameters(), weight.parameters(), strict=True))
    for old, new in pairs:
        new.requires_grad_(old.requires_grad)
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        exchange(optimizer, {old: (new, None) for old, new in pairs if id(old) in held})
    layer.tuned = {}  # what was measured, was so for other ranks
    layer.weight = weight.train(former.training)


def _shared(subjects: Mapping[str, Subject], budget: int) -> dict[str, Ranks | None]:
    """Ranks at one energy threshold; ValueError where rank 1 exceeds the budget."""
    found = share_energy(subjects, budget)
    if found is None:
        least = sum(int(subject.price(subject.at(0.0))) for subject in subjects.values())
        raise ValueError(f"ranks: budget must be at least {least}, which rank 1 takes, got {budget}")
    return found.ranks
