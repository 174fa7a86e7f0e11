"""What torch does with a low-rank + sparse weight without us."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .candidates import Candidate, Group, compile_call
from .measure import offer
from .sparse_problem import SparseProblem

EAGER, ADDED, COMPILED = "eager", "eager addmm", "compiled"
PRODUCT = "product alone"
REBUILT, REBUILT_COMPILED = "rebuild eager", "rebuild compiled"
CSR, DENSE, DENSE_COMPILED = "pair and CSR", "dense eager", "dense compiled"


class Weight(nn.Module):
    """W by torch's operations; ``added`` takes the sparse part into the product where that can be done."""

    def __init__(self, problem: SparseProblem, *, added: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.values = (nn.Parameter(w.detach()) for w in problem.weights()[:3])
        self.mask, self.reconstruct, self.added = problem.mask, problem.reconstruct, added

    def weight(self) -> Tensor:
        if self.added:
            return torch.addmm(torch.where(self.mask, self.values, 0), self.a, self.b)
        return self.reconstruct(self.a, self.b, self.values)

    def forward(self, x: Tensor | None) -> Tensor:
        return self.weight()


class Rebuilt(Weight):
    """A linear layer whose weight is reconstructed at every call."""

    def __init__(self, problem: SparseProblem) -> None:
        super().__init__(problem)
        self.bias = nn.Parameter(problem.weights()[3].detach())

    def forward(self, x: Tensor | None) -> Tensor:
        assert x is not None
        return F.linear(x, self.weight(), self.bias)


class PairAndCSR(nn.Module):
    """Both factors one after the other, and torch's compressed sparse rows; for inference."""

    def __init__(self, problem: SparseProblem) -> None:
        super().__init__()
        a, b, _, bias = (w.detach() for w in problem.weights())
        self.a, self.b, self.bias = a, b, bias
        self.sparse = (problem.additive_values() * problem.mask).to_sparse_csr()

    def forward(self, x: Tensor | None) -> Tensor:
        assert x is not None
        low = F.linear(F.linear(x, self.b), self.a, self.bias)
        return low + (self.sparse @ x.t()).t()


class Dense(nn.Module):
    """The dense layer."""

    def __init__(self, problem: SparseProblem) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.dense_weight())
        self.bias = nn.Parameter(problem.weights()[3].detach())

    def forward(self, x: Tensor | None) -> Tensor:
        assert x is not None
        return F.linear(x, self.weight, self.bias)


def library_ways(problem: SparseProblem, compiled: str) -> list[Candidate]:
    """What torch does without us; compiled ones last."""
    found = []
    if problem.case.rows is None:
        found.append(_offer(EAGER, "stages", problem, lambda: Weight(problem)))
        if problem.case.mode == "additive":
            found.append(_offer(ADDED, "stages", problem, lambda: Weight(problem, added=True)))
        if compiled != "never":
            found.append(_offer(COMPILED, "stages", problem, lambda: Weight(problem), frozen=False))
        if not problem.training:
            found.append(_product(problem))
        return found
    if not problem.training:
        found.append(_offer(CSR, "stages", problem, lambda: PairAndCSR(problem)))
    found.append(_offer(REBUILT, "rebuild", problem, lambda: Rebuilt(problem)))
    found.append(_offer(DENSE, "dense", problem, lambda: Dense(problem)))
    if compiled != "never":
        found.append(_offer(REBUILT_COMPILED, "rebuild", problem, lambda: Rebuilt(problem), frozen=False))
        frozen = not problem.training
        found.append(_offer(DENSE_COMPILED, "dense", problem, lambda: Dense(problem), frozen=frozen))
    return found


def _product(problem: SparseProblem) -> Candidate:
    """``A B`` by the library, without mask or sum: what ways with its product cannot be faster than."""
    a, b = problem.a, problem.b
    made = Candidate(PRODUCT, "part", problem.case.layout, problem.call(lambda: a @ b, []))
    made.to_factors = lambda outputs: ()
    return made


def _offer(
    name: str,
    group: Group,
    problem: SparseProblem,
    build: Callable[[], nn.Module],
    frozen: bool | None = None,
) -> Candidate:
    def make() -> Candidate:
        module = build().requires_grad_(problem.training)
        forward: Callable[..., Tensor] = module if frozen is None else compile_call(module, frozen=frozen)
        x = None if problem.case.rows is None else problem.x()
        wanted = _wanted(module, x)
        call = problem.call(lambda: forward(x), wanted)
        made = Candidate(name, group, problem.case.layout, call, frozen is not None)
        if isinstance(module, Dense):  # the gradient of a dense weight is compared with nothing
            made.to_factors = lambda outputs: outputs[:1]
        return made

    return offer(name, group, problem.case.layout, make)


def _wanted(module: nn.Module, x: Tensor | None) -> Sequence[Tensor]:
    """Parameters in the order of ``problem.names``, and the input behind them."""
    return [*module.parameters(), *(() if x is None else (x,))]
