"""Packed sparse matrices: there and back, and everything that is wrong with them named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tucker2_bad_calls import raised

from tensorcomp_ext.ops import PackedSparse, check_packed, pack_mask, pack_sparse, unpack_mask, unpack_sparse

SHAPES = [(9, 13), (1, 1), (4, 8), (3, 65), (0, 5), (5, 0), (2, 65536), (3, 65537), (2, 140000)]
POSITIONS = ("bitmap", "columns")


def made(
    m: int, n: int, kept: float = 0.3, positions: str | None = None
) -> tuple[Tensor, Tensor, PackedSparse]:
    values, mask = torch.randn(m, n), torch.rand(m, n) < kept
    return values, mask, pack_sparse(values, mask, positions=positions)


@pytest.mark.parametrize("shape", [(3, 17), (1, 8), (0, 3), (2, 0), (2, 3, 9), (5,)])
def test_masks_as_bits(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    bits = pack_mask(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (*shape[:-1], (shape[-1] + 7) // 8)
    assert torch.equal(unpack_mask(bits, shape[-1]), mask)
    for place in mask.nonzero():
        *front, j = place.tolist()
        assert bits[(*front, j // 8)] >> (j % 8) & 1
    padding = unpack_mask(bits, 8 * bits.shape[-1])[..., shape[-1] :]
    assert not padding.any()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kept", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape: tuple[int, int], kept: float, positions: str) -> None:
    values, mask, packed = made(*shape, kept, positions)
    check_packed(packed)
    assert packed.shape == shape
    assert packed.positions.dtype == (torch.uint8 if positions == "bitmap" else torch.int16)
    dense, found = unpack_sparse(packed)
    assert torch.equal(found, mask) and torch.equal(dense, values * mask)
    assert torch.equal(pack_sparse(values, pack_mask(mask), positions=positions).offsets, packed.offsets)


def test_the_smaller_positions_are_taken() -> None:
    for kept, dtype in ((0.02, torch.int16), (0.2, torch.uint8)):
        assert made(64, 64, kept)[2].positions.dtype == dtype
    for positions in POSITIONS:
        sizes = [made(64, 64, 0.05, p)[2].positions.nbytes for p in (None, positions)]
        assert sizes[0] <= sizes[1]


@pytest.mark.parametrize("positions", POSITIONS)
def test_gradients_pass_both_ways(positions: str) -> None:
    mask = torch.rand(5, 9) < 0.4
    values = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)

    def call(values: Tensor) -> Tensor:
        return unpack_sparse(pack_sparse(values, mask, positions=positions))[0]

    assert torch.autograd.gradcheck(call, values)
    assert torch.equal(torch.autograd.grad(call(values).sum(), values)[0], mask.double())


def test_an_explicit_zero_is_kept() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    packed = pack_sparse(torch.zeros(2, 3), mask)
    assert packed.values.shape == (6,) and torch.equal(unpack_sparse(packed)[1], mask)


def changed(form: str = "columns", /, **parts: Any) -> PackedSparse:
    """A sound matrix [4, 10] with two values a row, in columns 1 and 8, but for the parts given."""
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, 1] = mask[:, 8] = True
    return pack_sparse(torch.ones(4, 10), mask, positions=form)._replace(**parts)


def shorts(*columns: int) -> Tensor:
    return torch.tensor(columns, dtype=torch.int16)


OFFSETS = torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32)
BITS = torch.tensor([[2, 1]] * 4, dtype=torch.uint8)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "values a list": (lambda: changed(values=[1.0]), "packed.values must be a tensor, got list"),
    "values integers": (
        lambda: changed(values=torch.ones(8).int()),
        "packed.values must be of a floating dtype",
    ),
    "values' dims": (lambda: changed(values=torch.ones(2, 4)), "packed.values must be [nnz], got [2, 4]"),
    "values strided": (lambda: changed(values=torch.ones(16)[::2]), "packed.values must be contiguous"),
    "values elsewhere": (
        lambda: changed(offsets=OFFSETS.to("meta")),
        "packed.offsets must be on the values' device cpu, got meta",
    ),
    "columns no int": (lambda: changed(columns=10.0), "packed.columns must be an int, got 10.0"),
    "columns negative": (lambda: changed(columns=-1), "packed.columns must not be negative, got -1"),
    "offsets' dtype": (
        lambda: changed(offsets=OFFSETS.long()),
        "packed.offsets must be int32, got torch.int64",
    ),
    "offsets' dims": (lambda: changed(offsets=OFFSETS[None]), "packed.offsets must be [m * segments + 1]"),
    "no offsets": (lambda: changed(offsets=OFFSETS[:0]), "packed.offsets must be [m * segments + 1]"),
    "offsets of segments": (
        lambda: changed(columns=70000, offsets=OFFSETS[:4]),
        "with segments = 2, got [4]",
    ),
    "offsets start late": (
        lambda: changed(offsets=OFFSETS + torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32)),
        "packed.offsets must begin with 0 and end with nnz = 8, got 1 and 8",
    ),
    "offsets end early": (lambda: changed(offsets=OFFSETS - OFFSETS // 8), "nnz = 8, got 0 and 7"),
    "offsets descend": (
        lambda: changed(offsets=torch.tensor([0, 6, 4, 6, 8], dtype=torch.int32)),
        "packed.offsets must not descend",
    ),
    "positions' dtype": (
        lambda: changed(positions=shorts(*[1, 8] * 4).int()),
        "packed.positions must be uint8 or int16, got torch.int32",
    ),
    "fewer columns": (lambda: changed(positions=shorts(1, 8)), "must be [nnz] = [8], got [2]"),
    "bitmap's size": (
        lambda: changed("bitmap", positions=BITS[:3]),
        "packed.positions of dtype uint8 must be [m, ceil(n / 8)] = [4, 2], got [3, 2]",
    ),
    "column too large": (lambda: changed(positions=shorts(*[1, 10] * 4)), "must be columns below 10"),
    "column negative": (lambda: changed(positions=shorts(*[1, -1] * 4)), "must be columns below 10"),
    "column twice": (lambda: changed(positions=shorts(*[1, 1] * 4)), "must ascend within every row"),
    "columns descend": (lambda: changed(positions=shorts(*[8, 1] * 4)), "must ascend within every row"),
    "too many bits": (
        lambda: changed("bitmap", positions=BITS | torch.tensor([[4, 0]], dtype=torch.uint8)),
        "packed.positions must have as many bits as packed.offsets counts",
    ),
    "bits moved": (
        lambda: changed("bitmap", offsets=torch.tensor([0, 1, 4, 6, 8], dtype=torch.int32)),
        "packed.positions must have as many bits as packed.offsets counts",
    ),
    "bits behind": (
        lambda: changed("bitmap", positions=BITS + torch.tensor([[0, 128]], dtype=torch.uint8)),
        "packed.positions must have no bit behind column 9",
    ),
    "no matrix": (lambda: (1, 2, 3, 4), "packed must be a PackedSparse, got tuple"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_sound_is_named(name: str) -> None:
    make, text = BAD[name]
    packed = make()
    for call in (check_packed, unpack_sparse):
        kind, message = raised(lambda call=call: call(packed))  # type: ignore[misc]
        assert kind in ("ValueError", "TypeError") and text in message
        assert message.startswith(f"{call.__name__}: ")


def test_bad_arguments() -> None:
    values, mask = torch.ones(4, 10), torch.ones(4, 10, dtype=torch.bool)

    def said(values: Any = values, mask: Any = mask, **options: Any) -> tuple[str, str]:
        return raised(lambda: pack_sparse(values, mask, **options))

    assert said([1.0]) == ("TypeError", "pack_sparse: values must be a tensor of a floating dtype, got list")
    assert said(values.long())[1].endswith("got torch.int64")
    assert said(values[0]) == ("ValueError", "pack_sparse: values must be [m, n], got [10]")
    assert said(mask=1) == ("TypeError", "pack_sparse: mask must be a tensor, got int")
    assert said(mask=mask[1:]) == (
        "ValueError",
        "pack_sparse: mask of dtype bool must be [m, n] = [4, 10], got [3, 10]",
    )
    assert said(mask=pack_mask(mask[:, 2:])) == (
        "ValueError",
        "pack_sparse: mask of dtype uint8 must be [m, ceil(n / 8)] = [4, 2], got [4, 1]",
    )
    assert said(mask=mask.float())[1] == (
        "pack_sparse: mask must be bool, or uint8 as pack_mask makes it, got torch.float32"
    )
    assert said(positions="rows")[1].endswith("positions must be None, 'bitmap' or 'columns', got 'rows'")
    assert raised(lambda: pack_mask(values))[0] == "TypeError"
    assert raised(lambda: unpack_mask(mask, 10))[0] == "TypeError"
    assert raised(lambda: unpack_mask(pack_mask(mask), 17)) == (
        "ValueError",
        "unpack_mask: bits must be [..., ceil(columns / 8)] with ceil(columns / 8) = 3, got [4, 2]",
    )
