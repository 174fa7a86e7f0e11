"""Packed matrices whose numbers are not sound: refused in the same words, whoever serves or looks on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from tucker2_bad_calls import raised

from tensorcomp_ext.ops import PackedSparse, check_packed, lowrank_sparse_linear

OPS = torch.ops.tensorcomp


def by_op(x: Tensor, a: Tensor, b: Tensor, packed: PackedSparse, bias: Tensor | None) -> Tensor:
    return OPS.lowrank_sparse_linear(x, a, b, packed.values, bias, packed.offsets, packed.positions)


CALLS: dict[str, Callable[..., Tensor]] = {"op": by_op, "function": lowrank_sparse_linear}


def shorts(*columns: int) -> Tensor:
    return torch.tensor(columns, dtype=torch.int16)


UNSOUND: dict[str, dict[str, Tensor]] = {
    "offsets start late": {"offsets": torch.tensor([1, 2, 4, 6, 8], dtype=torch.int32)},
    "offsets end early": {"offsets": torch.tensor([0, 2, 4, 6, 7], dtype=torch.int32)},
    "offsets end late": {"offsets": torch.tensor([0, 2, 4, 6, 9], dtype=torch.int32)},
    "offsets descend": {"offsets": torch.tensor([0, 6, 4, 6, 8], dtype=torch.int32)},
    "offsets are negative": {"offsets": torch.tensor([0, -(2**31), 4, 6, 8], dtype=torch.int32)},
    "a column is too large": {"positions": shorts(1, 8, 1, 8, 1, 10, 1, 8)},
    "a column is negative": {"positions": shorts(-1, 8, 1, 8, 1, 8, 1, 8)},
    "too many bits": {"positions": torch.tensor([[6, 1]] + [[2, 1]] * 3, dtype=torch.uint8)},
    "too few bits": {"positions": torch.tensor([[2, 1]] * 3 + [[0, 1]], dtype=torch.uint8)},
    "a column out of order is too large": {"positions": shorts(1, 8, 10, 1, 1, 8, 1, 8)},
    "columns descend": {"positions": shorts(1, 8, 8, 1, 1, 8, 1, 8)},
    "columns descend and another is too large": {"positions": shorts(1, 8, 8, 1, 1, 10, 1, 8)},
    "bits behind": {"positions": torch.tensor([[2, 128]] + [[2, 1]] * 3, dtype=torch.uint8)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", UNSOUND)
def test_what_is_not_sound_is_refused(name: str, rows: int, dtype: torch.dtype, isa: str) -> None:
    """Whoever serves, in the same words: nothing out of bounds is read, forward or backward."""
    parts = {
        "values": torch.ones(8, dtype=dtype),
        "offsets": torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32),
        "positions": shorts(*[1, 8] * 4),
    } | UNSOUND[name]
    packed = PackedSparse(**parts, columns=10)  # type: ignore[arg-type]
    x, a, b = (torch.ones(s, dtype=dtype) for s in ((rows, 10), (4, 2), (2, 10)))
    wrong = raised(lambda: check_packed(packed))[1].removeprefix("check_packed: ")
    assert wrong.startswith("packed.")
    for call in CALLS.values():
        kind, text = raised(lambda call=call: call(x, a, b, packed, None))  # type: ignore[misc]
        assert kind == "ValueError" and text == f"lowrank_sparse_linear: {wrong}"
    back = OPS.lowrank_sparse_linear_backward
    kind, text = raised(lambda: back(torch.ones(rows, 4, dtype=dtype), x, a, b, *packed[:3], 31))
    assert kind == "ValueError" and text == f"lowrank_sparse_linear_backward: {wrong}"


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("name", UNSOUND)
def test_what_is_not_sound_is_refused_inside_transforms(name: str, way: str) -> None:
    """Offsets and positions are whole there, whatever is mapped or differentiated."""
    parts = {"offsets": torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32), "positions": shorts(*[1, 8] * 4)}
    parts |= UNSOUND[name]
    x, a, b, values = torch.ones(2, 3, 10), torch.ones(4, 2), torch.ones(2, 10), torch.ones(8)

    def call(x: Tensor, values: Tensor) -> Tensor:
        return CALLS[way](x, a, b, PackedSparse(values, **parts, columns=10), None)  # type: ignore[arg-type]

    wrong = raised(lambda: check_packed(PackedSparse(values, **parts, columns=10)))  # type: ignore[arg-type]
    said = (wrong[0], wrong[1].replace("check_packed", "lowrank_sparse_linear"))
    assert said[1].startswith("lowrank_sparse_linear: packed.")
    assert raised(lambda: vmap(call, (0, None))(x, values)) == said
    assert raised(lambda: vmap(call)(x, torch.stack([values, values]))) == said
    assert raised(lambda: grad(lambda v: call(x, v).sum())(values)) == said
    assert raised(lambda: jvp(lambda x: call(x, values), (x,), (x,))) == said
