"""Networks of cores that the tests of the contraction share."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorcomp_ext.ops._contract_program import PairProgram, fault

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
LAYOUTS = ("contiguous", "turned", "slice")


@dataclass(frozen=True)
class ContractCase:
    """A network written as einsum writes it, the sizes of its letters, and the pairs in order."""

    equation: str
    sizes: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def terms(self) -> list[str]:
        return self.equation.split("->")[0].split(",")

    @property
    def size_of(self) -> dict[str, int]:
        letters = dict.fromkeys(letter for term in self.terms for letter in term)
        return dict(zip(letters, self.sizes, strict=True))

    @property
    def program(self) -> PairProgram:
        number = {letter: at for at, letter in enumerate(self.size_of, 1)}
        *cores, result = (tuple(number[x] for x in t) for t in (*self.terms, self.equation.split("->")[1]))
        return PairProgram(tuple(cores), result, self.pairs)

    def make(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
        """Random cores; around one, for long sums of both signs lose digits in any order."""
        return [
            laid(1 + torch.randn([self.size_of[x] for x in term]), layout).to(dtype) for term in self.terms
        ]

    def exact(self, cores: Sequence[Tensor]) -> Tensor:
        """The result by one sum over all labels, in float64."""
        return torch.einsum(self.equation, *[core.double() for core in cores])

    def exact_gradients(self, cores: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [core.detach().double().requires_grad_() for core in cores]
        return torch.autograd.grad(self.exact(leaves), leaves, grad.double())


def laid(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in memory of a layout."""
    if layout == "turned":
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    if layout == "slice":
        wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
        wide[..., 2:-1] = tensor
        return wide[..., 2:-1]
    return tensor


def in_turn(count: int) -> tuple[tuple[int, int], ...]:
    """One core after the other."""
    return ((0, 1), *((at, count + at - 2) for at in range(2, count)))


def random_case(seed: int) -> ContractCase:
    """Some cores with labels in common here and there, multiplied in any order."""
    draw = random.Random(seed)
    while True:
        case = _drawn(draw)
        program = case.program
        sizes = [math.prod(case.sizes[label - 1] for label in group) for group in program.products()]
        if not fault(program) and max(sizes) < 100_000:
            return case


def _drawn(draw: random.Random) -> ContractCase:
    count = draw.randint(2, 8)
    terms: list[list[str]] = [[] for _ in range(count)]
    result, sizes = [], {}
    for letter in LETTERS[: draw.randint(count, 2 * count + 4)]:
        open_ones = [term for term in terms if len(term) < 5]
        if not open_ones:
            break
        first = draw.choice(open_ones)
        others = [term for term in open_ones if term is not first]
        first.append(letter)
        # Bonds are likelier than modes, so that results stay small.
        if others and draw.random() < 0.6:
            draw.choice(others).append(letter)
            sizes[letter] = draw.choice((1, 2, 3, 5, 7, 17))
        else:
            result.append(letter)
            sizes[letter] = draw.choice((1, 2, 3, 4))
    for term in terms:
        draw.shuffle(term)
    draw.shuffle(result)
    waiting, pairs = list(range(count)), []
    while len(waiting) > 1:
        first, second = sorted(draw.sample(waiting, 2))
        pairs.append((first, second))
        waiting = [place for place in waiting if place not in (first, second)] + [count + len(pairs) - 1]
    letters = dict.fromkeys(letter for term in terms for letter in term)
    equation = f"{','.join(''.join(term) for term in terms)}->{''.join(result)}"
    return ContractCase(equation, tuple(sizes[letter] for letter in letters), tuple(pairs))


CASES = {
    "numbers": ContractCase(",->", (), ((0, 1),)),
    "dot": ContractCase("a,a->", (9,), ((0, 1),)),
    "outer": ContractCase("ab,c->cab", (3, 5, 7), ((0, 1),)),
    "matrix": ContractCase("ab,bc->ac", (12, 5, 9), ((0, 1),)),
    "turned matrix": ContractCase("ab,bc->ca", (33, 31, 65), ((0, 1),)),
    "vector": ContractCase("ab,b->a", (65, 17), ((0, 1),)),
    "all sizes 1": ContractCase("ab,bc,cd->ad", (1, 1, 1, 1), in_turn(3)),
    "rank 1": ContractCase("aib,bjc,ckd->dikja", (1, 6, 1, 5, 1, 7, 1), in_turn(3)),
    "train": ContractCase("aib,bjc,ckd,dle->klije", (1, 4, 6, 3, 5, 8, 7, 5, 1), ((0, 1), (2, 3), (4, 5))),
    "ring": ContractCase("aib,bjc,ckd,dla->lkij", (3, 5, 6, 4, 10, 9, 7, 8), ((1, 2), (0, 3), (4, 5))),
    "matrix train": ContractCase(
        "aijb,bklc,cmnd->ikmjlnad", (1, 4, 3, 5, 2, 6, 7, 8, 3, 1), ((0, 1), (2, 3))
    ),
    "tucker": ContractCase("abc,ia,jb,kc->ikj", (4, 5, 6, 9, 17, 3), ((0, 2), (3, 4), (1, 5))),
    "products first": ContractCase("a,b,ab,i->i", (3, 4, 5), ((0, 1), (2, 4), (3, 5))),
    # Enough work for several threads.
    "large ring": ContractCase(
        "aib,bjc,ckd,dla->lijk", (10, 16, 10, 4, 10, 9, 10, 64), ((0, 1), (2, 4), (3, 5))
    ),
    "large matrix": ContractCase("ab,bc->ac", (130, 65, 121), ((0, 1),)),
} | {f"random {seed}": random_case(seed) for seed in range(12)}
