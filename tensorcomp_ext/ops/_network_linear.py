"""What the linear ops of every core network share: checks, the search for an order, the call of the chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._contraction import Macs, Structure, cheapest_order
from ._contraction_layout import Chain, chain_of
from ._conv_arguments import check_tensor
from .chain import chain, native_support

_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch.is_autocast_enabled


def check_modes(modes: object, argument: str, name: str) -> tuple[int, ...]:
    """``modes`` as a tuple of ints of at least 1, at least one of them."""
    if not isinstance(modes, Sequence) or isinstance(modes, str) or any(type(m) is not int for m in modes):
        raise TypeError(f"{name}: {argument} must be a sequence of ints >= 1, got {modes!r}")
    if not modes or min(modes) < 1:
        raise ValueError(f"{name}: {argument} must be a sequence of ints >= 1, got {tuple(modes)}")
    return tuple(modes)


def check_cores(cores: object, letters: str, name: str) -> None:
    """Raise unless ``cores`` is a list of tensors of as many modes as ``letters`` names, none of them empty.

    The first mode of each is the last one of the core before.
    """
    if not isinstance(cores, (list, tuple)):
        raise TypeError(f"{name}: cores must be a list of tensors, got {type(cores).__name__}")
    if not cores:
        raise ValueError(f"{name}: cores must be a list of at least one tensor, got none")
    rank = None
    for index, core in enumerate(cores):
        check_tensor(core, f"cores[{index}]", letters.count(",") + 1, letters, name)
        if 0 in core.shape:
            raise ValueError(
                f"{name}: cores[{index}] must be {letters} with no empty mode, got {list(core.shape)}"
            )
        if rank is not None and core.shape[0] != rank:
            raise ValueError(
                f"{name}: cores[{index}] must be {letters} with r = {rank}, got {list(core.shape)}"
            )
        rank = core.shape[-1]


def check_ends(cores: Sequence[Tensor], first: int, letters: str, name: str) -> None:
    """Raise unless the train begins and ends with rank ``first``."""
    if cores[0].shape[0] != first:
        raise ValueError(f"{name}: cores[0] must be {letters} with r = {first}, got {list(cores[0].shape)}")
    last = cores[-1]
    if last.shape[-1] != first:
        raise ValueError(
            f"{name}: cores[{len(cores) - 1}] must be {letters} with r' = {first}, got {list(last.shape)}"
        )


def check_core_modes(
    cores: Sequence[Tensor], out_modes: Sequence[int], in_modes: Sequence[int], name: str
) -> None:
    """Raise unless the middle modes of the cores are the output modes, then the input modes."""
    modes = (*out_modes, *in_modes)
    if len(cores) != len(modes):
        raise ValueError(
            f"{name}: cores must be one for each of {len(out_modes)} out_modes and {len(in_modes)} in_modes, "
            f"got {len(cores)}"
        )
    for index, (core, mode) in enumerate(zip(cores, modes, strict=True)):
        if core.shape[1] != mode:
            raise ValueError(
                f"{name}: cores[{index}] must be [r, n, r'] with n = {mode}, got {list(core.shape)}"
            )


def check_arguments(
    x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, in_features: int, out_features: int, name: str
) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless input and bias fit the cores."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{name}: x must be [..., in] with in = {in_features}, got {list(x.shape)}")
    named = [(core, f"cores[{index}]") for index, core in enumerate(cores)]
    if bias is not None:
        check_tensor(bias, "bias", 1, "[out]", name)
        if bias.shape[0] != out_features:
            raise ValueError(f"{name}: bias must be [out] with out = {out_features}, got {list(bias.shape)}")
        named.append((bias, "bias"))
    for value, argument in named:
        if value.dtype != x.dtype:
            raise TypeError(f"{name}: {argument} must have x's dtype {x.dtype}, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name}: {argument} must be on x's device {x.device}, got {value.device}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: x must be of a floating dtype, got {x.dtype}")


def train_structure(cores: Sequence[Tensor], outputs: int, ring: bool) -> Structure:
    """Labels of cores ``[r, n, r']``, of which so many carry output modes.

    Mode k has the label k, and the rank in front of core k the label ``len(cores) + k``.
    """
    count = len(cores)
    labels, sizes = [], []
    for k, core in enumerate(cores):
        left, mode, right = map(int, core.shape)  # a program has numbers, not the symbols of torch.compile
        following = count if ring and k + 1 == count else count + k + 1
        labels.append((count + k, k, following))
        sizes += [(count + k, left), (k, mode), (following, right)]
    return Structure(
        tuple(labels), tuple(sorted(set(sizes))), tuple(range(outputs)), tuple(range(outputs, count))
    )


def matrix_structure(cores: Sequence[Tensor]) -> Structure:
    """Labels of cores ``[r, out_k, in_k, r']``, a ring.

    Output mode k has the label k, input mode k ``d + k``, the rank in front of core k ``2 d + k``.
    """
    count = len(cores)
    labels, sizes = [], []
    for k, core in enumerate(cores):
        left, out, into, right = map(int, core.shape)
        following = 2 * count + (k + 1) % count
        labels.append((2 * count + k, k, count + k, following))
        sizes += [(2 * count + k, left), (k, out), (count + k, into), (following, right)]
    return Structure(
        tuple(labels), tuple(sorted(set(sizes))), tuple(range(count)), tuple(range(count, 2 * count))
    )


def as_op(x: Tensor) -> bool:
    """Whether a call goes through the dispatcher: autocast is registered there, and a tracer keeps the op."""
    return _is_compiling() or (isinstance(x, Tensor) and _is_autocast_enabled(x.device.type))


def cheapest_chain(structure: Structure, x: Tensor) -> Chain:
    """The chain of least multiply-adds for the rows of ``x``, merging cores at this call included."""
    rows = math.prod(x.shape[:-1])
    # A number of rows that torch.compile leaves open counts as large: then only work by rows matters. Powers
    # of two, so that few orders are searched for.
    cost = Macs(1 << (rows - 1).bit_length() if rows else 1) if type(rows) is int else Macs(1, merging=False)
    order = cheapest_order(structure, cost)
    assert order is not None  # one group of all cores always serves
    return chain_of(structure, order)


def run(
    name: str,
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    structure: Structure,
    backend: str | None,
    oracle: Callable[[], Tensor],
) -> Tensor:
    """The layer of arguments that fit, by ``backend``; errors name the op ``name``."""
    if backend is not None and backend not in ("native", "reference"):
        raise ValueError(f"{name}: backend must be None, 'native' or 'reference', got {backend!r}")
    if backend == "reference":
        return oracle().contiguous()
    found = cheapest_chain(structure, x)
    with torch.autocast(x.device.type, enabled=False):  # products in the lower dtype would be rounded twice
        matrices = found.matrices(cores)
    if backend == "native":
        support = native_support(x, matrices, found.program)
        if not support.ok:
            raise ValueError(f"{name}: backend='native' cannot serve: {support.reason}")
    return chain(x, matrices, bias, program=found.program, backend=backend)
