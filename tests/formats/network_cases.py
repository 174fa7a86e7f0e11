"""Weights of every folded format, small and uneven, and their entries index by index."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorcomp_ext.formats import Format, get_format


class Case(NamedTuple):
    format: str
    shape: tuple[int, ...]
    rank: int | tuple[int, ...]
    options: Mapping[str, Any] = MappingProxyType({})

    def __str__(self) -> str:
        folded = "-folded" if self.options else ""
        return f"{self.format}-{'x'.join(map(str, self.shape))}{folded}"

    def random(self, **options: Any) -> Any:
        torch.manual_seed(0)
        return get_format(self.format).random(self.shape, self.rank, **self.options, **options)


MATRIX = {"out_modes": (3, 4), "in_modes": (4, 5), "input_order": (1, 0)}
KERNEL = {"out_modes": (2, 3), "in_modes": (4, 2)}
CASES = [
    Case("tt", (12, 10), 3),
    Case("tt", (12, 20), (2, 3, 2), MATRIX),
    Case("tt", (6, 8, 3, 2), (4, 3)),
    Case("tt", (6, 8, 3), (2, 3, 2, 1), KERNEL),
    Case("tr", (12, 20), (2, 3, 1, 4), MATRIX),
    Case("tr", (7, 11), 2),
    Case("tr", (5, 4, 3, 2), (2, 3, 4)),
    Case("tr", (6, 8, 3, 1, 2), (2, 1, 3, 2, 2), KERNEL),
    Case("ttm", (12, 20), 3, {"input_order": (1, 0, 2)}),
    Case("ttm", (11, 20), (4,), {"out_modes": (3, 4), "in_modes": (4, 5)}),
    Case("ttm", (6, 8, 3, 2), (4, 3), KERNEL),
    Case("ttm", (5, 4, 3), 2),
    Case("tr_matrix", (12, 20), (2, 3), MATRIX),
    Case("tr_matrix", (23, 8), (3, 1, 2), {"out_modes": (2, 3, 4), "in_modes": (2, 2, 2)}),
    Case("cp", (12, 20), 5, MATRIX),
    Case("cp", (7, 11), 1),
    Case("cp", (6, 8, 3, 2), 3),
    Case("cp", (6, 8, 3), 4, KERNEL),
    Case("cp", (3, 4, 3, 1, 2), 2),
    Case("tucker", (12, 20), (2, 3, 4, 2), MATRIX),
    Case("tucker", (12, 20), 3),
    Case("tucker", (6, 8, 3, 2), (3, 4, 2, 1)),
    Case("tucker", (6, 8, 3), (2, 1, 3, 2, 2), KERNEL),
]


def dense_by_entries(weight: Format) -> torch.Tensor:
    """Every entry by the defining sum of the format, from the indices of its modes."""
    structure = weight.structure
    outs, ins = structure["out_modes"], structure["in_modes"]
    order = structure.get("input_order", range(len(ins)))
    factors = [factor.detach().double().numpy() for factor in weight.factors]
    dense = np.zeros(tuple(weight.shape))
    for index in np.ndindex(*dense.shape):
        o = np.unravel_index(index[0], outs)
        stored = np.unravel_index(index[1], [ins[place] for place in order])
        i = [int(stored[list(order).index(place)]) for place in range(len(ins))]
        dense[index] = _entry(weight, factors, [int(n) for n in o], i, index[2:])
    return torch.from_numpy(dense)


def _entry(
    weight: Format, factors: list[np.ndarray], o: list[int], i: list[int], k: tuple[int, ...]
) -> float:
    tap = [int(np.ravel_multi_index(k, tuple(weight.shape[2:])))] if k else []
    if weight.name in ("tt", "tr"):
        modes = [*i, *tap, *o] if k else [*o, *i]
        return _chain([core[:, n, :] for core, n in zip(factors, modes, strict=True)])
    if weight.name == "ttm" and k:
        first, *cores = factors
        slices = [core[:, b, a, :] for core, a, b in zip(cores, o, i, strict=True)]
        return _chain([first[tap[0]][None], *slices])
    if weight.name in ("ttm", "tr_matrix"):
        return _chain([core[:, a, b, :] for core, a, b in zip(factors, o, i, strict=True)])
    if weight.name == "cp":
        rows = [factor[n] for factor, n in zip(factors, [*o, *i, *k], strict=True)]
        return float(np.prod(rows, axis=0).sum())
    core = factors[0]
    for factor, n in zip(factors[1:], [*o, *i, *k], strict=True):
        core = np.tensordot(factor[n], core, 1)  # the first mode of the core goes
    return float(core)


def _chain(slices: list[np.ndarray]) -> float:
    product = slices[0]
    for each in slices[1:]:
        product = product @ each
    return float(np.trace(product))
