"""Small networks with sparse parts, and pruning of them written for reading."""

import torch
from torch import nn

from tensorcomp_ext.formats import LowRankSparse
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear


def sparse_network(mode="additive", seed=1):
    """A convolution, a depthwise one without a low-rank part, and two linear layers, the last dense."""
    torch.manual_seed(seed)
    options = {"format": "lowrank_sparse", "mode": mode}
    return nn.Sequential(
        FactorizedConv2d(1, 6, 3, padding=1, rank=(2, 1), low_rank="tucker2", **options),
        FactorizedConv2d(6, 6, 3, padding=1, groups=6, rank=(), low_rank="none", **options),
        nn.ReLU(),
        nn.Flatten(),
        FactorizedLinear(6 * 64, 16, rank=2, low_rank="tt", **options),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def weights(model):
    return [m for m in model.modules() if isinstance(m, LowRankSparse)]


def masks(model):
    return [weight.kept.clone() for weight in weights(model)]


def scores(weight, criterion="magnitude"):
    score = weight.sparse.detach().reshape(weight.shape)
    if criterion == "difference" and weight.low_rank is not None:
        score = score - weight.low_rank.to_dense().detach().reshape(weight.shape)
    return score.abs()


def pruned_by_sorting(model, sparsity, criterion="magnitude"):
    """The masks after pruning: all entries sorted by (kept, score, index), the first of them dropped."""
    entries, count = [], 0
    for weight in weights(model):
        kept, score = weight.kept.flatten().tolist(), scores(weight, criterion).flatten().tolist()
        entries += [(k, s if k else 0.0, count + i) for i, (k, s) in enumerate(zip(kept, score, strict=True))]
        count += len(kept)
    dropped = {index for _, _, index in sorted(entries)[: round(sparsity * count)]}
    flat = torch.tensor([kept and index not in dropped for kept, _, index in entries])
    shapes = [weight.shape for weight in weights(model)]
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
