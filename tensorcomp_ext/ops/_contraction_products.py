"""Contraction of some labelled tensors to one, two at a time in the cheapest order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ._contract_program import Labels, numbered
from ._contraction import Group, Structure, merge_plan
from .contract import native_contract, served_plainly

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Contraction:
    """The sum over all labels that the result does not have, as products of two tensors.

    Plain float32 tensors on the CPU go through all products in one call of the ``contract`` op where it takes
    them, which leaves out labels of three tensors (the rank of CP), sums over one tensor's own modes, and
    traces; everything else, and what is traced or transformed, is an einsum for each product.
    """

    steps: tuple[tuple[int, int, str], ...]
    """Places of two tensors, those given first and then each product, and the einsum that multiplies them."""
    macs: int
    """Multiply-adds at the sizes it was planned for."""
    program: tuple[int, ...] = ()
    """As the ``contract`` op takes it; empty where it does not."""
    alone: str | tuple[int, ...] = ()
    """Of a single tensor: an einsum, or its dims that are summed over and then the others, in order."""
    dims: int = 0
    """Dimensions of the result."""

    def __call__(self, tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The result, folded to ``shape``."""
        if self.program and served_plainly(tensors):
            return native_contract(tensors, self.program, shape)
        if not self.steps:
            return self._arranged(tensors[0]).reshape(shape)
        held: list[Tensor | None] = list(tensors)
        for first, second, equation in self.steps:
            product = torch.einsum(equation, held[first], held[second])
            held[first] = held[second] = None  # not kept longer than gradients need them
            held.append(product)
        made = held[-1]
        assert made is not None
        return made.reshape(shape)

    def _arranged(self, only: Tensor) -> Tensor:
        if isinstance(self.alone, str):
            return torch.einsum(self.alone, only)
        only = only.permute(self.alone)
        for _ in range(only.dim() - self.dims):
            only = only[0] if only.shape[0] == 1 else only.sum(0)
        return only


def contraction(
    labels: Sequence[Sequence[int]], sizes: Mapping[int, int], result: Sequence[int]
) -> Contraction:
    """The cheapest contraction of tensors with these labels to a tensor with the labels ``result``.

    A label may occur in any number of tensors and is summed over once, as in einsum.
    """
    present = sorted({label for group in labels for label in group})
    structure = Structure(tuple(map(tuple, labels)), tuple((k, sizes[k]) for k in present), tuple(result), ())
    return group_contraction(structure, tuple(range(len(labels))), tuple(result))


@lru_cache(maxsize=4096)
def group_contraction(structure: Structure, group: Group, result: Labels) -> Contraction:
    """The cheapest contraction of some cores of a network to the labels ``result``.

    Those are the ones that other cores, the input or the output have too, in any order.
    """
    held = [structure.labels[core] for core in group]
    if len(held) == 1:
        return Contraction((), 0, (), _alone(held[0], result, structure.size_of), len(result))
    place_of: dict[Group, int] = {(core,): place for place, core in enumerate(group)}
    plan = merge_plan(structure, group)
    ends = {*structure.outputs, *structure.inputs}
    places: list[tuple[int, int]] = []
    steps: list[tuple[int, int, str]] = []
    for left, right in plan.pairs:
        first, second = sorted((place_of[left], place_of[right]))
        both = tuple(sorted((*left, *right)))
        outside = ends.union(*(labels for core, labels in enumerate(structure.labels) if core not in both))
        a, b = held[first], held[second]
        kept = tuple(dict.fromkeys(label for label in (*a, *b) if label in outside))
        if len(steps) + 2 == len(group):
            kept = result
        steps.append((first, second, einsum_equation([a, b], kept)))
        places.append((first, second))
        place_of[both] = len(held)
        held.append(kept)
    program = numbered(tuple(held[: len(group)]), result, places, structure.size_of)
    return Contraction(tuple(steps), plan.macs, tuple(program.encode()) if program else (), (), len(result))


def _alone(labels: Labels, result: Labels, sizes: Mapping[int, int]) -> str | tuple[int, ...]:
    if any(labels.count(label) > 1 and sizes[label] > 1 for label in labels):
        return einsum_equation([labels], result)  # a trace
    order = [place for place, label in enumerate(labels) if label not in result]
    return (*order, *(labels.index(label) for label in result))


def einsum_equation(operands: Sequence[Labels], result: Labels) -> str:
    """The einsum of operands with these labels whose result has the labels ``result``.

    Raises:
        ValueError: more labels than einsum has letters.
    """
    count = len({label for operand in operands for label in operand})
    if count > len(_LETTERS):
        raise ValueError(f"einsum: a product must have at most {len(_LETTERS)} labels, got {count}")
    labels = {
        label: _LETTERS[i] for i, label in enumerate(dict.fromkeys(label for o in operands for label in o))
    }
    left = ",".join("".join(labels[label] for label in operand) for operand in operands)
    return f"{left}->{''.join(labels[label] for label in result)}"
