"""Tensor trains by successive truncated SVDs: TT-SVD of a tensor, TTM-SVD of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .chain_ranks import ChainRanks, check_modes, train_ranks
from .svd import CANCELLATION, leading_factor
from .unfolding import check_tensor, project, residual_of_product, squared_norm


class TensorTrain(NamedTuple):
    """Cores [R_{k-1}, n_k, R_k] (TTM: [R_{k-1}, out_k, in_k, R_k]) with R_0 = R_d = 1.

    relative_error = ‖A − Â‖/‖A‖ of the float64 cores, before the cast.
    """

    cores: tuple[Tensor, ...]
    relative_error: float


def chain_product(cores: Sequence[Tensor]) -> Tensor:
    """Merge neighbouring cores [r, n, r'] into one [r, prod n, r'], row-major; the shorter side first."""
    if len(cores) == 1:
        return cores[0]
    middle = len(cores) // 2
    left, right = chain_product(cores[:middle]), chain_product(cores[middle:])
    first, last = left.shape[0], right.shape[2]
    return (left.reshape(-1, left.shape[2]) @ right.reshape(right.shape[0], -1)).reshape(first, -1, last)


def middle_cut(sizes: Sequence[int]) -> int:
    """The cut k in 1 … d − 1 at which the products of the sizes on both sides differ least."""
    total = math.prod(sizes)
    lefts = [math.prod(sizes[:k]) for k in range(1, len(sizes))]
    return 1 + min(range(len(lefts)), key=lambda i: lefts[i] + total // lefts[i])


def chain_residual(tensor: Tensor, cores: Sequence[Tensor]) -> float:
    """‖A − Â‖² of a ring (or train) of cores, formed in blocks from the two halves of the chain."""
    if len(cores) == 1:
        return squared_norm(tensor.double() - torch.einsum("aia->i", cores[0]).reshape(tensor.shape))
    cut = middle_cut([core.shape[1] for core in cores])
    left, right = chain_product(cores[:cut]), chain_product(cores[cut:])
    rows = left.permute(1, 0, 2).reshape(left.shape[1], -1)
    columns = right.permute(2, 0, 1).reshape(-1, right.shape[1])
    return residual_of_product(tensor.reshape(rows.shape[0], columns.shape[1]), rows, columns)


def sweep(tensor: Tensor, sizes: Sequence[int], ranks: Sequence[int], first: int = 1) -> list[Tensor]:
    """The sweep of TT-SVD in float64: cores [r, n, r'], all but the last with orthonormal columns.

    `tensor` is anything that reshapes to [first, *sizes, last]; `ranks` are the bonds between the modes.
    """
    cores: list[Tensor] = []
    rest, rank = tensor, first
    for size, after in zip(sizes, ranks, strict=False):
        matrix = rest.reshape(rank * size, -1)
        left = leading_factor(matrix, 0, after)
        rest = project(matrix, 0, left)
        cores.append(left.reshape(rank, size, after))
        rank = after
    cores.append(rest.double().reshape(rank, sizes[-1], -1))
    return cores


def _sweep_error(tensor: Tensor, cores: Sequence[Tensor]) -> float:
    """‖A − Â‖/‖A‖ after a sweep, which only projects: ‖A‖² − ‖last core‖², or the residual itself."""
    total = squared_norm(tensor)
    if total == 0.0:
        return 0.0
    missing = 1.0 - squared_norm(cores[-1]) / total
    if missing <= CANCELLATION:
        missing = chain_residual(tensor, cores) / total
    return math.sqrt(missing)


def tt_svd64(tensor: Tensor, ranks: Sequence[int]) -> tuple[list[Tensor], float]:
    """`tt_svd` of a checked contiguous tensor at clipped inner ranks: float64 cores, relative error."""
    cores = sweep(tensor, tensor.shape, ranks)
    return cores, _sweep_error(tensor, cores)


def tt_svd(tensor: Tensor, ranks: ChainRanks) -> TensorTrain:
    """Tensor train `A[i_1 … i_d] ≈ Π_k G_k[:, i_k, :]` by d − 1 truncated SVDs (Oseledets, 2011).

    The sweep takes U of the R_{k-1}·n_k × rest unfolding as core k and carries on with UᵀA. The squared
    error is at most the sum over the bonds of the discarded energies of the unfoldings of A, hence at most
    √(d − 1) times that of the best train. Computed in float64, cast to the dtype and device of `tensor`
    last. Cost: about numel·n_1·½ multiply-adds for the first unfolding, numel·R_1·n_2·½ and so on for the
    next.

    `ranks`: an int, the d − 1 inner ranks, or d + 1 with the boundary ones; clipped as `train_ranks` says.

    Raises:
        ValueError: NaN, Inf, an empty tensor, a rank below 1 or a wrong number of ranks.
        DecompositionError: no driver converges.
    """
    checked = check_tensor(tensor, "tt_svd: tensor", min_ndim=1).contiguous()
    cores, error = tt_svd64(checked, train_ranks(checked.shape, ranks, "tt_svd: ranks"))
    return TensorTrain(tuple(core.to(tensor.device, tensor.dtype).contiguous() for core in cores), error)


def interleave(matrix: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """[M, N] as the tensor [out_1·in_1, …, out_d·in_d] whose train is the TTM form of the matrix."""
    modes = len(out_modes)
    order = [axis for k in range(modes) for axis in (k, modes + k)]
    paired = [o * i for o, i in zip(out_modes, in_modes, strict=True)]
    return matrix.reshape(*out_modes, *in_modes).permute(order).reshape(paired)


def check_matrix(
    name: str, matrix: Tensor, out_modes: Sequence[SupportsIndex], in_modes: Sequence[SupportsIndex]
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """The checked matrix and its modes; ValueError where they do not fit together."""
    checked = check_tensor(matrix, f"{name}: matrix", min_ndim=2, max_ndim=2).contiguous()
    outs = check_modes(name, "out_modes", out_modes, checked.shape[0])
    ins = check_modes(name, "in_modes", in_modes, checked.shape[1])
    if len(outs) != len(ins):
        raise ValueError(f"{name}: needs as many out_modes as in_modes, got {outs} and {ins}")
    return checked, outs, ins


def split_modes(
    cores: Sequence[Tensor], out_modes: Sequence[int], in_modes: Sequence[int], like: Tensor
) -> tuple[Tensor, ...]:
    """Cores [r, o·i, r'] as [r, o, i, r'] of the dtype and device of `like`."""
    return tuple(
        core.reshape(core.shape[0], o, i, core.shape[2]).to(like.device, like.dtype).contiguous()
        for core, o, i in zip(cores, out_modes, in_modes, strict=True)
    )


def ttm_svd(
    matrix: Tensor, ranks: ChainRanks, out_modes: Sequence[SupportsIndex], in_modes: Sequence[SupportsIndex]
) -> TensorTrain:
    """TT-matrix `W[(o_1…o_d), (i_1…i_d)] ≈ Π_k G_k[:, o_k, i_k, :]` (Novikov et al., 2015).

    The entries are reordered to a tensor of modes o_k·i_k, of which TT-SVD gives the cores [r, o_k, i_k, r'].
    Bounds, cost, ranks and errors as `tt_svd`; ValueError too where the modes do not multiply to the shape.
    """
    checked, outs, ins = check_matrix("ttm_svd", matrix, out_modes, in_modes)
    tensor = interleave(checked, outs, ins)
    cores, error = tt_svd64(tensor, train_ranks(tensor.shape, ranks, "ttm_svd: ranks"))
    return TensorTrain(split_modes(cores, outs, ins, matrix), error)
