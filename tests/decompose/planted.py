"""Tensors and oracles that the tests of trains, rings and CP share."""

import math

import torch


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def ring(cores):
    """The tensor of a ring (or train) of cores [r, n, r'], one mode after another."""
    full = cores[0].double()
    for core in cores[1:]:
        full = torch.tensordot(full, core.double(), 1)
    return torch.einsum("a...a->...", full)


def matrix_ring(cores):
    """The matrix of a ring (or train) of cores [r, o, i, r']."""
    outs, ins = [c.shape[1] for c in cores], [c.shape[2] for c in cores]
    full = ring([c.flatten(1, 2) for c in cores]).reshape(
        [n for pair in zip(outs, ins, strict=True) for n in pair]
    )
    modes = len(cores)
    order = [2 * k for k in range(modes)] + [2 * k + 1 for k in range(modes)]
    return full.permute(order).reshape(math.prod(outs), math.prod(ins))


def kruskal(factors):
    """The tensor of CP factors, by one einsum."""
    letters = "abcdefgh"[: len(factors)]
    return torch.einsum(",".join(f"{c}z" for c in letters) + f"->{letters}", *(f.double() for f in factors))


def random_ring(sizes, ranks, seed=0):
    modes = len(sizes)
    return ring([random(ranks[k], sizes[k], ranks[(k + 1) % modes], seed=seed + k) for k in range(modes)])


def tails(tensor):
    """Squared tails of the unfoldings of a train: tails[k][r] = Σ_{i≥r} σ_i²."""
    found = []
    for k in range(1, tensor.ndim):
        energy = torch.linalg.svdvals(tensor.reshape(math.prod(tensor.shape[:k]), -1)) ** 2
        found.append(torch.cat([energy.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]))
    return found
