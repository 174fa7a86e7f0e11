"""Weights of which some ranks are cut: which entries of a bond stay, in all factors that carry it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .base import Format


def bond_sizes(weight: Format) -> dict[str, int]:
    """The size of each bond of a weight by name."""
    return {bond: getattr(weight, name).shape[dim] for bond, ((name, dim), *_) in weight.bonds().items()}


def stored_at(weight: Format, sizes: Mapping[str, int]) -> int:
    """Stored weights with other sizes of some bonds."""
    shapes = {name: list(getattr(weight, name).shape) for name in weight.factor_names}
    for bond, places in weight.bonds().items():
        for name, dim in places:
            shapes[name][dim] = sizes.get(bond, shapes[name][dim])
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def narrowed(factor: Tensor, name: str, weight: Format, kept: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the shape of the factor ``name`` with the entries that :func:`take` keeps.

    Moments that an optimizer has of a factor are narrowed in the same way.
    """
    for bond, places in weight.bonds().items():
        if bond in kept:
            for factor_name, dim in places:
                if factor_name == name:
                    factor = factor.index_select(dim, kept[bond].to(factor.device))
    return factor


@torch.no_grad()
def take(weight: Format, kept: Mapping[str, Tensor]) -> Format:
    """A weight with some entries of its bonds, in factors of its own.

    Args:
        kept: indices, int64, of the entries that stay, by bond; bonds that are not named stay whole.

    Raises:
        ValueError: a bond the weight does not have, or one that nothing would be left of.
    """
    bonds = weight.bonds()
    for bond, indices in kept.items():
        if bond not in bonds:
            raise ValueError(f"take: {weight.name} has the bonds {sorted(bonds)}, got {bond!r}")
        if not len(indices):
            raise ValueError(f"take: of bond {bond} at least one entry must stay, got none")
    factors = []
    for name, factor in zip(weight.factor_names, weight.factors, strict=True):
        left = narrowed(factor.detach(), name, weight, kept)
        left = left.clone() if left.data_ptr() == factor.data_ptr() else left
        factors.append(nn.Parameter(left, requires_grad=factor.requires_grad))
    made = type(weight)._of(factors, weight.shape, weight.structure)
    return made.train(weight.training)
