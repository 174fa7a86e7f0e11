"""What linear layers with tensor trains and rings share: the call of checked arguments, the registration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ._network_linear import (
    check_arguments,
    check_core_modes,
    check_cores,
    check_ends,
    check_modes,
    run,
    train_structure,
)
from ._register import define, register_autocast, register_composite

_LETTERS = "[r, n, r']"

SCHEMA = "(Tensor x, Tensor[] cores, Tensor? bias=None, *, int[] in_modes, int[] out_modes) -> Tensor"


def train_linear(
    name: str,
    oracle: Callable[..., Tensor],
    ring: bool,
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
    backend: str | None,
) -> Tensor:
    """The layer by the cheapest order of products; errors name the op ``name``."""
    inner, outer = check_modes(in_modes, "in_modes", name), check_modes(out_modes, "out_modes", name)
    check_cores(cores, _LETTERS, name)
    check_ends(cores, cores[0].shape[0] if ring else 1, _LETTERS, name)
    check_core_modes(cores, outer, inner, name)
    check_arguments(x, cores, bias, math.prod(inner), math.prod(outer), name)
    structure = train_structure(cores, len(outer), ring=ring)
    return run(
        name,
        x,
        cores,
        bias,
        structure,
        backend,
        lambda: oracle(x, cores, bias, in_modes=inner, out_modes=outer),
    )


def register_train_linear(name: str, oracle: Callable[..., Tensor], ring: bool) -> None:
    """Define ``tensorcomp::name``, which is made of other ops."""

    def composite(
        x: Tensor,
        cores: Sequence[Tensor],
        bias: Tensor | None = None,
        *,
        in_modes: Sequence[int],
        out_modes: Sequence[int],
    ) -> Tensor:
        return train_linear(name, oracle, ring, x, cores, bias, in_modes, out_modes, None)

    define(name, SCHEMA)
    register_composite(name, composite)
    register_autocast(name, tensors=3)
