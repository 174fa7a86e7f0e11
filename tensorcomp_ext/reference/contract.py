"""Oracle of a network of cores contracted pair by pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def contract(
    cores: Sequence[Tensor],
    labels: Sequence[Sequence[int]],
    result: Sequence[int],
    pairs: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Products of pairs of tensors, summed over the labels that both have and at last over what is left.

    ``C[a.., b..] = sum_k A[a.., k..] B[b.., k..]`` for every pair, the last one's modes in the order of the
    result.

    Args:
        cores: tensors of any shape; modes of one label have one size.
        labels: for each core, one label a mode, each once.
        result: the labels of the result, which no two cores share.
        pairs: places of two tensors, the cores first and behind them each product; each is used once.

    Returns:
        The product of every pair, the last one the result.

    Cost: for each pair the product of the sizes of all its labels, in MACs.
    """
    tensors, held = list(cores), [list(group) for group in labels]
    for number, (first, second) in enumerate(pairs):
        a, b = held[first], held[second]
        kept = [label for label in a if label not in b] + [label for label in b if label not in a]
        if number + 1 == len(pairs):
            kept = list(result)
        tensors.append(torch.einsum(tensors[first], a, tensors[second], b, kept))
        held.append(kept)
    return tensors[len(cores) :]
