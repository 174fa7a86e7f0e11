"""Embedding whose table is a tensor-train or tensor-ring matrix: registration and the public function.

``csrc/ops/ttm_embedding.cpp`` serves CPU float32 and bfloat16, ``csrc/ops/cuda/ttm_embedding.cpp`` CUDA
float32, float16 and bfloat16; whatever they cannot take goes to the oracle, and :func:`native_support` says
why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._native import Support
from . import _cuda
from ._oracle_gradients import mask_bits
from ._register import define, fallthrough_autograd, register_autograd, register_default
from ._transforms import transformed
from ._ttm_embedding_autograd import (
    SCHEMAS,
    autograd_kernel,
    differentiable_ttm_embedding,
    gradients,
    native_ttm_embedding,
    oracle,
)

__all__ = [
    "SCHEMAS",
    "check_indices",
    "checked_sizes",
    "differentiable_ttm_embedding",
    "native_support",
    "ttm_embedding",
]

_NAME = "ttm_embedding"
_CORE = "[r, vocab_k, dim_k, r']"
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_MOST_CORES = 8
_OPS = torch.ops.tensorcomp
_is_compiling = torch.compiler.is_compiling


def native_support(indices: Tensor, cores: Sequence[Tensor]) -> Support:
    """Whether a native kernel takes this problem, and the reason when it does not."""
    if indices.is_cpu:
        loaded = _native.status()
        if loaded.ok and cores[0].dtype not in _NATIVE_DTYPES:
            return Support(False, f"the native CPU kernel takes float32 and bfloat16, not {cores[0].dtype}")
        if loaded.ok and not 2 <= len(cores) <= _MOST_CORES:
            return Support(False, f"the native CPU kernel takes 2 to {_MOST_CORES} cores, not {len(cores)}")
        return loaded
    if indices.is_cuda:
        return _cuda.embedding_support(indices, cores)
    return Support(False, f"there is no native {_NAME} for device {indices.device.type!r}")


def ttm_embedding(
    indices: Tensor,
    cores: Sequence[Tensor],
    *,
    num_embeddings: int,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rows of an embedding table in tensor-train or tensor-ring matrix form, without forming the table.

    ``y[n, j_1 ... j_K] = sum_r prod_k cores[k][r_{k-1}, i_k, j_k, r_k]`` with ``i_1 ... i_K`` the digits of
    ``indices[n]`` in the mixed base ``vocab_1 ... vocab_K``, the first the most significant. Where the cores'
    first rank, which is also their last, is above 1 the sum closes the ring. Gradients reach the cores only,
    and no tensor of the table's size is made in either direction. As for ``torch.nn.functional.embedding``
    autocast changes nothing. Inside ``torch.func`` transforms and forward-mode differentiation the reference
    computes, from torch operations.

    Args:
        indices: any shape, int64 or int32.
        cores: ``cores[k]`` ``[r, vocab_k, dim_k, r']``; the product of all ``vocab_k`` is at least
            ``num_embeddings``, and what is beyond is padding that no index can reach.
        num_embeddings: rows of the table.
        padding_idx: index of a row that is zero and takes no gradient; a negative one counts from the end.
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[*indices.shape, dim]``, ``dim`` the product of all ``dim_k``, contiguous.

    Cost: ``sum_k r_0 dim_1 ... dim_k r_{k-1} r_k`` MACs an index at most; the native kernel computes equal
    indices once, and the product of the leading cores once for all indices with the same leading digits.

    Raises:
        IndexError: an index outside ``[0, num_embeddings)``; on CUDA an assertion of the device instead.
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, indices of another dtype, or dtypes that differ.

    Source: Hrinchuk et al. 2020 (tensor-train embeddings); Yin et al. 2021.
    """
    checked_sizes(indices, cores)
    padding = checked_rows(cores, num_embeddings, padding_idx)
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{_NAME}: backend must be None, 'native' or 'reference', got {backend!r}")
    if backend != "reference":
        support = native_support(indices, cores)
        if support.ok:
            if _is_compiling():
                return _OPS.ttm_embedding.default(indices, cores, num_embeddings, padding)
            if not transformed():
                return native_ttm_embedding(indices, cores, num_embeddings, padding)
            support = Support(False, "function transforms and forward-mode AD go to the reference")
        if backend == "native":
            raise ValueError(f"{_NAME}: backend='native' cannot serve: {support.reason}")
    if _is_compiling():
        return _OPS.ttm_embedding.default(indices, cores, num_embeddings, padding)
    check_indices(indices, num_embeddings)
    return oracle(indices, cores, num_embeddings, padding)


def checked_sizes(indices: Tensor, cores: Sequence[Tensor], name: str = _NAME) -> None:
    """Raise ``ValueError`` or ``TypeError`` naming the argument, what was expected and what was given."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: indices must be int64 or int32, got {indices.dtype}")
    if not isinstance(cores, (list, tuple)) or len(cores) == 0:
        raise ValueError(f"{name}: cores must be a list or tuple of tensors {_CORE}, one at least")
    rank: int | None = None
    for k, core in enumerate(cores):
        if not isinstance(core, Tensor):
            raise TypeError(f"{name}: cores[{k}] must be a tensor, got {type(core).__name__}")
        if core.dim() != 4 or core.numel() == 0:
            raise ValueError(f"{name}: cores[{k}] must be {_CORE} with no empty mode, got {list(core.shape)}")
        if core.dtype != cores[0].dtype:
            raise TypeError(f"{name}: cores[{k}] must have the dtype {cores[0].dtype}, got {core.dtype}")
        if core.device != indices.device:
            raise ValueError(
                f"{name}: cores[{k}] must be on the indices' device {indices.device}, got {core.device}"
            )
        if rank is not None and core.shape[0] != rank:
            raise ValueError(f"{name}: cores[{k}] must be {_CORE} with r = {rank}, got {list(core.shape)}")
        rank = core.shape[3]
    if rank != cores[0].shape[0]:
        raise ValueError(
            f"{name}: cores[{len(cores) - 1}] must be {_CORE} with r' = {cores[0].shape[0]}, the first rank, "
            f"got {list(cores[-1].shape)}"
        )
    if not cores[0].is_floating_point():
        raise TypeError(f"{name}: cores must be of a floating dtype, got {cores[0].dtype}")


def checked_rows(
    cores: Sequence[Tensor], num_embeddings: int, padding_idx: int | None, name: str = _NAME
) -> int:
    """``padding_idx`` as the op takes it (-1: none), after checking it and the number of rows."""
    padded = math.prod([core.shape[1] for core in cores])
    if isinstance(num_embeddings, bool) or not isinstance(num_embeddings, (int, torch.SymInt)):
        raise TypeError(f"{name}: num_embeddings must be an int, got {num_embeddings!r}")
    if not 1 <= num_embeddings <= padded:
        raise ValueError(
            f"{name}: num_embeddings must be in [1, {padded}], the product of all vocab_k, "
            f"got {num_embeddings}"
        )
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"{name}: padding_idx must be in [{-num_embeddings}, {num_embeddings}) or None, got {padding_idx}"
        )
    return padding_idx % num_embeddings


def check_indices(indices: Tensor, num_embeddings: int, name: str = _NAME) -> None:
    """Raise ``IndexError`` for an index out of range; on CUDA the device asserts, without waiting for it.

    Indices mapped over by a transform have no values to look at; of those the oracle's look-ups refuse what
    is out of every range.
    """
    if indices.numel() == 0 or torch._C._functorch.is_batchedtensor(indices):
        return
    if not indices.is_cpu:
        torch._assert_async(((indices >= 0) & (indices < num_embeddings)).all())
        return
    least, most = (int(v) for v in torch.aminmax(indices))
    if least < 0 or most >= num_embeddings:
        wrong = least if least < 0 else most
        raise IndexError(f"{name}: indices must be in [0, {num_embeddings}), got {wrong}")


# --- registration ---


def _forward(indices: Tensor, cores: Sequence[Tensor], num_embeddings: int, padding_idx: int = -1) -> Tensor:
    check_indices(indices, num_embeddings)
    return oracle(indices, cores, num_embeddings, padding_idx).contiguous()


def _backward(
    grad: Tensor,
    indices: Tensor,
    cores: Sequence[Tensor],
    num_embeddings: int,
    padding_idx: int,
    output_mask: int,
) -> list[Tensor]:
    wanted = mask_bits(output_mask, len(cores))
    found = gradients(grad, indices, cores, num_embeddings, padding_idx, wanted, create_graph=False)
    return [cores[0].new_empty(0) if g is None else g.contiguous() for g in found]


def _fake_forward(
    indices: Tensor, cores: Sequence[Tensor], num_embeddings: int, padding_idx: int = -1
) -> Tensor:
    checked_sizes(indices, cores)
    return cores[0].new_empty((*indices.shape, math.prod([core.shape[2] for core in cores])))


def _fake_backward(
    grad: Tensor,
    indices: Tensor,
    cores: Sequence[Tensor],
    num_embeddings: int,
    padding_idx: int,
    output_mask: int,
) -> list[Tensor]:
    wanted = mask_bits(output_mask, len(cores))
    return [core.new_empty(core.shape if w else (0,)) for core, w in zip(cores, wanted, strict=True)]


for _op, _schema in SCHEMAS.items():
    define(_op, _schema)
register_default(_NAME, _forward, _fake_forward)
register_default(f"{_NAME}_backward", _backward, _fake_backward)
register_autograd(_NAME, autograd_kernel)
fallthrough_autograd(f"{_NAME}_backward")
