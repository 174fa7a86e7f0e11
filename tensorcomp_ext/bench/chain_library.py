"""What torch does with a linear layer of many cores without us: two merged factors, opt_einsum, rebuild,
dense."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .candidates import Candidate, Group, compile_call
from .chain_cases import LAYOUT
from .chain_problem import ChainProblem
from .cores import Cores
from .cores import Group as CoreGroup
from .measure import offer, refused

TLTORCH = "tltorch"


class Pair(nn.Module):
    """The cores merged to two factors at the split that takes the fewest operations, then two products.

    In inference the factors are merged once, in float64; in training at every call, as their gradients need.
    Every product is one ``F.linear``; where its rows would have to be rearranged for that, ``batched`` takes
    a matrix product for each row instead, which leaves them where they are.
    """

    def __init__(self, problem: ChainProblem, split: tuple[CoreGroup, CoreGroup], *, batched: bool) -> None:
        super().__init__()
        self.spec, self.split, self.batched = problem.case.cores, split, batched
        *cores, bias = (nn.Parameter(w.detach()) for w in problem.weights())
        self.bias = bias
        self.products = _products(self.spec, split, batched)
        if problem.training:
            self.cores = nn.ParameterList(cores)
        else:
            merged = self._merge([core.detach().double() for core in cores])
            self.merged = nn.ParameterList(m.to(bias.dtype).contiguous() for m in merged)
        self.training_step = problem.training

    def _merge(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The matrix ``[new, contracted]`` of each product."""
        found = []
        for group, product in zip(self.split, self.products, strict=True):
            equation = self.spec.equation(group, (*product.new, *product.contracted))
            merged = torch.einsum(equation, *(cores[i] for i in group))
            found.append(merged.reshape(self.spec.volume(product.new), -1))
        return found

    def forward(self, x: Tensor) -> Tensor:
        matrices = self._merge(list(self.cores)) if self.training_step else list(self.merged)
        rows, sizes = x.shape[0], self.spec.sizes
        last, after = self.products[-1], self.products[-1].after
        plain = not last.prefix and after == self.spec.outputs  # the last product can add the bias
        for product, matrix in zip(self.products, matrices, strict=True):
            if product.prefix:
                x = torch.matmul(matrix, x.reshape(rows, matrix.shape[1], -1))
            else:
                if product.rearranged:
                    shape = [sizes[label] for label in product.before]
                    places = [product.before.index(label) for label in (*product.kept, *product.contracted)]
                    x = x.reshape(rows, *shape).permute(0, *(1 + place for place in places))
                bias = self.bias if plain and product is last and not product.kept else None
                x = nn.functional.linear(x.reshape(-1, matrix.shape[1]), matrix, bias)
        if plain and not last.kept:
            return x
        if after != self.spec.outputs:
            places = [after.index(label) for label in self.spec.outputs]
            x = x.reshape(rows, *(sizes[n] for n in after)).permute(0, *(1 + p for p in places))
        return x.reshape(rows, -1) + self.bias


class _Product:
    """One product over a row with the labels ``before``: which it contracts, keeps and brings."""

    def __init__(
        self, before: tuple[int, ...], merged: frozenset[int], outputs: Sequence[int], batched: bool
    ) -> None:
        contracted = tuple(label for label in before if label in merged)
        kept = tuple(label for label in before if label not in merged)
        new = sorted(merged - set(before))
        ranks = tuple(label for label in new if label not in outputs)
        brought = tuple(label for label in new if label in outputs)
        suffix = before[len(before) - len(contracted) :] == contracted
        self.before, self.contracted, self.kept = before, contracted, kept
        self.prefix = batched and not suffix and before[: len(contracted)] == contracted
        self.rearranged = not suffix and not self.prefix
        # Ranks lie beside what the next product contracts with them.
        self.new = (*brought, *ranks) if self.prefix else (*ranks, *brought)
        self.after = (*self.new, *kept) if self.prefix else (*kept, *self.new)


def _products(spec: Cores, split: tuple[CoreGroup, CoreGroup], batched: bool) -> list[_Product]:
    first = _Product(spec.inputs, spec.merged(split[0], frozenset()), spec.outputs, batched)
    done = frozenset(split[0])
    return [first, _Product(first.after, spec.merged(split[1], done), spec.outputs, batched)]


class Contraction(nn.Module):
    """Rows and all cores handed to opt_einsum, which contracts two at a time in the order it finds best."""

    def __init__(self, problem: ChainProblem) -> None:
        super().__init__()
        import opt_einsum

        case = problem.case
        *cores, bias = (nn.Parameter(w.detach()) for w in problem.weights())
        self.cores, self.bias = nn.ParameterList(cores), bias
        self.in_modes = case.in_modes
        shapes = [(case.rows, *case.in_modes), *case.cores.shapes]
        self.expression = opt_einsum.contract_expression(
            case.cores.row_equation(), *shapes, optimize="auto-hq"
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.expression(x.reshape(-1, *self.in_modes), *self.cores)
        return y.reshape(x.shape[0], -1) + self.bias


class Rebuild(nn.Module):
    """The weight multiplied out from the cores at every call, then one product."""

    def __init__(self, problem: ChainProblem) -> None:
        super().__init__()
        *cores, bias = (nn.Parameter(w.detach()) for w in problem.weights())
        self.cores, self.bias = nn.ParameterList(cores), bias
        self.equation = problem.case.cores.equation()
        self.shape = problem.case.c_out, problem.case.c_in

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum(self.equation, *self.cores).reshape(self.shape)
        return nn.functional.linear(x, weight, self.bias)


class Dense(nn.Module):
    """The layer that was decomposed, its weight held dense."""

    def __init__(self, problem: ChainProblem) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.dense_weight())
        self.bias = nn.Parameter(problem.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def library_ways(problem: ChainProblem, compiled: str) -> list[Candidate]:
    """What torch and the packages for it do without us; compiled ones last."""
    found = []
    split = problem.case.cores.pair
    pair: Pair | None = None
    if split is not None:
        pair = Pair(problem, split, batched=False)
        found.append(_candidate("pair eager", "stages", pair, problem))
        if any(product.prefix for product in _products(problem.case.cores, split, True)):
            batched = Pair(problem, split, batched=True)
            found.append(_candidate("pair batched eager", "stages", batched, problem))
    name = "opt_einsum eager"
    if importlib.util.find_spec("opt_einsum") is None:
        found.append(refused(name, "stages", LAYOUT, "opt_einsum is not installed"))
    else:
        found.append(
            offer(name, "stages", LAYOUT, lambda: _candidate(name, "stages", Contraction(problem), problem))
        )
    found.append(_candidate("rebuild eager", "rebuild", Rebuild(problem), problem))
    found.append(_candidate("dense eager", "dense", Dense(problem), problem))
    found.append(offer(TLTORCH, "stages", LAYOUT, lambda: _tltorch(problem)))
    if compiled != "never":
        # For inference frozen too: the weights folded in and packed.
        for frozen in (False,) if problem.training else (False, True):
            text = "frozen" if frozen else "compiled"
            if split is not None and pair is not None:
                module = Pair(problem, split, batched=False)
                found.append(_candidate(f"pair {text}", "stages", module, problem, frozen))
            if frozen or problem.training:
                found.append(_candidate(f"dense {text}", "dense", Dense(problem), problem, frozen))
    return found


def _candidate(
    name: str, group: Group, module: nn.Module, problem: ChainProblem, frozen: bool | None = None
) -> Candidate:
    module.requires_grad_(problem.training)
    forward = module if frozen is None else compile_call(module, frozen=frozen)
    named = dict(module.named_parameters())
    bias = named.pop("bias")
    parameters = [*named.values(), bias]
    found = Candidate(name, group, LAYOUT, problem.call(forward, parameters), frozen is not None)
    if group == "dense":
        found.to_factors = lambda outputs: outputs[:2]
    return found


def _tltorch(problem: ChainProblem) -> Candidate:
    """tltorch's factorized layer, contracted by opt_einsum; of our formats it has the tensor-train matrix."""
    case = problem.case
    if importlib.util.find_spec("tltorch") is None:
        raise ValueError("tltorch (tensorly-torch) is not installed")
    if case.format != "ttm":
        raise ValueError(f"tltorch has no {case.format} for linear layers")
    import tensorly
    import tltorch

    tensorly.set_backend("pytorch")
    tensorly.plugins.use_opt_einsum("optimal")
    ranks = (1, *case.cores.ranks, 1)
    layer = tltorch.FactorizedLinear(
        case.in_modes,
        case.out_modes,
        bias=True,
        factorization="blocktt",
        rank=ranks,
        implementation="factorized",
        dtype=problem.bias.dtype,
    )
    *cores, bias = problem.weights()
    held = list(layer.weight.factors)
    with torch.no_grad():
        for factor, core in zip(held, cores, strict=True):
            factor.copy_(core)
        layer.bias.copy_(bias)
    layer.requires_grad_(problem.training)
    return Candidate(TLTORCH, "stages", LAYOUT, problem.call(layer, [*held, layer.bias]))
