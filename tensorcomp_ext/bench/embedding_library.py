"""What torch does with a factorized table without us: slices row by row, the table rebuilt, or dense."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .candidates import Candidate, Group, compile_call
from .chain_cases import LAYOUT
from .chain_library import TLTORCH
from .embedding_problem import EmbeddingProblem
from .measure import offer

SLICES, REBUILT, GATHER = "slices bmm", "rebuilt gather", "dense gather"
_MOST_BYTES = 6 << 30
"""Slices that would take more are not gathered: the machine may not have it."""


class Slices(nn.Module):
    """The slices of every index gathered from each core, and multiplied row by row in batched products.

    Parameters are ``[vocab_k, r, dim_k, r']``, so that a slice lies together.
    """

    def __init__(self, problem: EmbeddingProblem) -> None:
        super().__init__()
        held = (w.detach().transpose(0, 1).contiguous() for w in problem.weights())
        self.cores = nn.ParameterList(nn.Parameter(core) for core in held)
        self.modes, self.dim = problem.case.vocab_modes, problem.case.dim

    def forward(self, indices: Tensor) -> Tensor:
        digits = torch.unravel_index(indices, self.modes)
        rows = indices.shape[0]
        first, *rest = self.cores
        ring, last = first.shape[1], len(rest) - 1
        z = F.embedding(digits[0], first.flatten(1)).view(rows, -1, first.shape[3])  # [n, R0 D, r]
        if not rest:
            return z.view(rows, ring, -1, ring).diagonal(0, 1, 3).sum(-1)
        for k, core in enumerate(rest):
            _, left, dim, right = core.shape
            slices = F.embedding(digits[k + 1], core.flatten(1))
            if k == last and ring > 1:
                # The ring is closed in the same product: R0 and r are summed together.
                z = z.view(rows, ring, -1, left).permute(0, 2, 1, 3).reshape(rows, -1, ring * left)
                slices = slices.view(rows, left, dim, ring).permute(0, 3, 1, 2).reshape(rows, -1, dim)
            else:
                slices = slices.view(rows, left, dim * right)
            z = torch.bmm(z, slices)
            if k != last:
                z = z.view(rows, -1, right)
        return z.reshape(rows, self.dim)


class Rebuilt(nn.Module):
    """The whole table multiplied out at every call, then gathered from."""

    def __init__(self, problem: EmbeddingProblem) -> None:
        super().__init__()
        self.cores = nn.ParameterList(nn.Parameter(w.detach()) for w in problem.weights())
        self.multiply = problem.multiply

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.multiply(list(self.cores)))


def library_ways(problem: EmbeddingProblem, compiled: str) -> list[Candidate]:
    """What torch does without us; the compiled one last."""
    found = [offer(SLICES, "stages", LAYOUT, lambda: _slices(problem, None))]
    found.append(_candidate(REBUILT, "rebuild", Rebuilt(problem), problem))
    table = nn.Embedding.from_pretrained(problem.table(), freeze=not problem.training)
    gather = _candidate(GATHER, "dense", table, problem)
    gather.to_factors = lambda outputs: outputs[:1]
    found.append(gather)
    found.append(offer(TLTORCH, "stages", LAYOUT, lambda: _tltorch(problem)))
    if compiled != "never":
        found.append(offer(f"{SLICES} compiled", "stages", LAYOUT, lambda: _slices(problem, False)))
    return found


def _candidate(
    name: str, group: Group, module: nn.Module, problem: EmbeddingProblem, frozen: bool | None = None
) -> Candidate:
    module.requires_grad_(problem.training)
    forward = module if frozen is None else compile_call(module, frozen=frozen)
    call = problem.call(forward, list(module.parameters()))
    return Candidate(name, group, LAYOUT, call, frozen is not None)


def _slices(problem: EmbeddingProblem, frozen: bool | None) -> Candidate:
    case = problem.case
    widest = max(shape[0] * shape[2] * shape[3] for shape in case.cores.shapes)
    needed = case.rows * widest * problem.grad.element_size() * (4 if problem.training else 2)
    if needed > _MOST_BYTES:
        raise ValueError(f"the slices of {case.rows} rows would take {needed / 2**30:.0f} GiB")
    name = SLICES if frozen is None else f"{SLICES} compiled"
    found = _candidate(name, "stages", Slices(problem), problem, frozen)
    found.to_factors = lambda outputs: (outputs[0], *(grad.transpose(0, 1) for grad in outputs[1:]))
    return found


def _tltorch(problem: EmbeddingProblem) -> Candidate:
    """tltorch's factorized embedding; of our formats it has the tensor-train matrix."""
    case = problem.case
    if importlib.util.find_spec("tltorch") is None:
        raise ValueError("tltorch (tensorly-torch) is not installed")
    if case.format != "ttm":
        raise ValueError(f"tltorch has no {case.format} for embeddings")
    import tensorly
    import tltorch

    tensorly.set_backend("pytorch")
    tensorly.plugins.use_opt_einsum("optimal")
    layer = tltorch.FactorizedEmbedding(
        case.cores.volume(case.cores.outputs),
        case.dim,
        auto_tensorize=False,
        tensorized_num_embeddings=case.vocab_modes,
        tensorized_embedding_dim=case.dim_modes,
        factorization="blocktt",
        rank=(1, *case.cores.ranks, 1),
        dtype=problem.grad.dtype,
    )
    held = list(layer.weight.factors)
    with torch.no_grad():
        for factor, core in zip(held, problem.weights(), strict=True):
            factor.copy_(core)
    layer.requires_grad_(problem.training)
    return Candidate(TLTORCH, "stages", LAYOUT, problem.call(layer, held))
