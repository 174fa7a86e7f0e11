"""Sparse matrices as the layers store them: the kept values, and where they belong in few bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.lowrank_sparse_linear import SEGMENT, coordinates, segments_of
from ..reference.lowrank_sparse_weight import pack_mask, unpack_mask
from ._transforms import transformed, with_numbers

__all__ = ["PackedSparse", "check_packed", "pack_mask", "pack_sparse", "unpack_mask", "unpack_sparse"]

_MOST_VALUES = 2**31 - 1


class PackedSparse(NamedTuple):
    """A sparse matrix ``[m, n]``; :func:`pack_sparse` makes it.

    Rows of more than 65,536 columns are cut into segments of so many: ``segments = max(1, ceil(n / 65536))``.
    """

    values: Tensor
    """What is kept, row by row and by ascending column: a floating dtype, ``[nnz]``. Zeros may be there."""
    offsets: Tensor
    """Where in ``values`` each segment of each row begins, and at last nnz: int32 ``[m * segments + 1]``."""
    positions: Tensor
    """Either one bit an entry, uint8 ``[m, ceil(n / 8)]`` (:func:`pack_mask`), or the column of every value,
    counted from the beginning of its segment: int16 ``[nnz]``, to be read as unsigned."""
    columns: int
    """n"""

    @property
    def shape(self) -> tuple[int, int]:
        """m and n."""
        return (self.offsets.shape[0] - 1) // segments_of(self.columns), self.columns


def pack_sparse(values: Tensor, mask: Tensor, *, positions: str | None = None) -> PackedSparse:
    """The entries of ``values`` that ``mask`` keeps.

    Differentiable in ``values``.

    Args:
        values: ``[m, n]``, a floating dtype.
        mask: bool ``[m, n]``, or uint8 ``[m, ceil(n / 8)]`` from :func:`pack_mask`.
        positions: "bitmap" or "columns"; None takes whichever is smaller.

    Raises:
        ValueError: sizes that do not fit, 2**31 values or more, another word for ``positions``.
        TypeError: an argument that is no tensor or of another dtype.
    """
    name = "pack_sparse"
    if positions not in (None, "bitmap", "columns"):
        raise ValueError(f"{name}: positions must be None, 'bitmap' or 'columns', got {positions!r}")
    if not isinstance(values, Tensor) or not values.is_floating_point():
        given = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name}: values must be a tensor of a floating dtype, got {given}")
    if values.dim() != 2:
        raise ValueError(f"{name}: values must be [m, n], got {list(values.shape)}")
    check_mask(mask, values, name)
    kept = unpack_mask(mask, values.shape[1]) if mask.dtype == torch.uint8 else mask
    m, n = values.shape
    # A device is waited for once, here.
    row, column = kept.nonzero(as_tuple=True)
    if row.shape[0] > _MOST_VALUES:
        raise ValueError(f"{name}: mask must keep at most {_MOST_VALUES} values, got {row.shape[0]}")
    segments = segments_of(n)
    counts = torch.bincount(row * segments + column // SEGMENT, minlength=m * segments)
    offsets = torch.zeros(m * segments + 1, dtype=torch.int32, device=values.device)
    offsets[1:] = counts.cumsum(0)
    bitmap = takes_bitmap(m, n, row.shape[0]) if positions is None else positions == "bitmap"
    if bitmap:
        places = pack_mask(kept)
    else:
        within = column % SEGMENT
        places = torch.where(within < SEGMENT // 2, within, within - SEGMENT).to(torch.int16)
    return PackedSparse(values[row, column], offsets, places, n)


def takes_bitmap(rows: int, columns: int, nnz: int) -> bool:
    """Whether one bit an entry takes no more than 16 bits a value."""
    bitmap, listed = _bytes_of_places(rows, columns, nnz)
    return bitmap <= listed


def positions_bytes(rows: int, columns: int, nnz: int) -> int:
    """Bytes of a packed matrix beside its values: offsets, and the smaller of the positions."""
    return min(_bytes_of_places(rows, columns, nnz)) + 4 * (rows * segments_of(columns) + 1)


def _bytes_of_places(rows: int, columns: int, nnz: int) -> tuple[int, int]:
    """Of positions as bits, and as columns."""
    return rows * ((columns + 7) // 8), 2 * nnz


def unpack_sparse(packed: PackedSparse) -> tuple[Tensor, Tensor]:
    """The dense values ``[m, n]``, zero where nothing is kept, and the bool mask of what is.

    Differentiable in ``packed.values``.

    Raises:
        ValueError, TypeError: as :func:`check_packed`.
    """
    check_packed(packed, "unpack_sparse")
    m, n = packed.shape
    row, column = coordinates(packed.offsets, packed.positions, m, n)
    dense = packed.values.new_zeros(m, n).index_put((row, column), packed.values)
    mask = torch.zeros(m, n, dtype=torch.bool, device=packed.values.device)
    mask[row, column] = True
    return dense, mask


def check_packed(packed: PackedSparse, name: str = "check_packed") -> None:
    """Raise unless the parts are what :func:`pack_sparse` could have made; looks at every number but values.

    Raises:
        ValueError: sizes, memory, offsets, bits or columns that are not as they should be.
        TypeError: parts that are no tensors or of another dtype.
    """
    check_parts(packed, name)
    values, offsets, positions, n = packed
    m, _ = packed.shape
    nnz, segments = values.shape[0], segments_of(n)
    counts = offsets[1:].long() - offsets[:-1].long()
    ends = (int(offsets[0]), int(offsets[-1]))
    if ends != (0, nnz):
        raise ValueError(
            f"{name}: packed.offsets must begin with 0 and end with nnz = {nnz}, got {ends[0]} and {ends[1]}"
        )
    if bool((counts < 0).any()):
        raise ValueError(f"{name}: packed.offsets must not descend")
    if positions.dtype == torch.uint8:
        if n % 8 and bool((positions[:, -1] >> n % 8).any()):
            raise ValueError(f"{name}: packed.positions must have no bit behind column {n - 1}")
        kept = unpack_mask(positions, n)
        found = torch.cat([part.sum(1, keepdim=True) for part in kept.split(SEGMENT, 1)], 1).flatten()
        if not torch.equal(found, counts):
            raise ValueError(f"{name}: packed.positions must have as many bits as packed.offsets counts")
        return
    segment = torch.repeat_interleave(torch.arange(m * segments, device=offsets.device), counts)
    within = positions.long() & (SEGMENT - 1)
    width = (n - segment % segments * SEGMENT).clamp(max=SEGMENT)
    if bool((within >= width).any()):
        raise ValueError(f"{name}: packed.positions must be columns below {n}")
    place = segment * SEGMENT + within
    if bool((place[1:] <= place[:-1]).any()):
        raise ValueError(f"{name}: packed.positions must ascend within every row")


def check_numbers(packed: PackedSparse, name: str) -> None:
    """As :func:`check_packed`, unless a transform maps offsets or positions or a tracer holds them."""
    if not transformed():
        check_packed(packed, name)
        return
    offsets, positions = with_numbers(packed.offsets), with_numbers(packed.positions)
    if offsets is not None and positions is not None:
        check_packed(packed._replace(offsets=offsets, positions=positions), name)


def check_parts(packed: PackedSparse, name: str) -> None:
    """What :func:`check_packed` asks of the parts' types and sizes; the time of a few comparisons."""
    if not isinstance(packed, PackedSparse):
        raise TypeError(f"{name}: packed must be a PackedSparse, got {type(packed).__name__}")
    values, offsets, positions, n = packed
    for tensor, part in ((values, "values"), (offsets, "offsets"), (positions, "positions")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: packed.{part} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != values.device:
            raise ValueError(
                f"{name}: packed.{part} must be on the values' device {values.device}, got {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: packed.{part} must be contiguous, got strides {tensor.stride()}")
    if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
        raise TypeError(f"{name}: packed.columns must be an int, got {n!r}")
    if n < 0:
        raise ValueError(f"{name}: packed.columns must not be negative, got {n}")
    if not values.is_floating_point():
        raise TypeError(f"{name}: packed.values must be of a floating dtype, got {values.dtype}")
    if values.dim() != 1:
        raise ValueError(f"{name}: packed.values must be [nnz], got {list(values.shape)}")
    check_places(values, offsets, positions, n, None, name, "packed.")


def check_places(
    values: Tensor,
    offsets: Tensor,
    positions: Tensor,
    columns: int,
    rows: int | None,
    name: str,
    prefix: str = "",
) -> None:
    """Whether offsets and positions have the dtypes and sizes of a matrix ``[rows, columns]``."""
    segments = segments_of(columns)
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name}: {prefix}offsets must be int32, got {offsets.dtype}")
    fits = offsets.dim() == 1 and offsets.shape[0] % segments == 1 % segments and offsets.shape[0] > 0
    if not fits or (rows is not None and offsets.shape[0] != rows * segments + 1):
        wanted = "" if rows is None else f" = [{rows * segments + 1}]"
        raise ValueError(
            f"{name}: {prefix}offsets must be [m * segments + 1]{wanted} with segments = {segments}, "
            f"got {list(offsets.shape)}"
        )
    if positions.dtype == torch.uint8:
        expected = [(offsets.shape[0] - 1) // segments, (columns + 7) // 8]
        if list(positions.shape) != expected:
            raise ValueError(
                f"{name}: {prefix}positions of dtype uint8 must be [m, ceil(n / 8)] = {expected}, "
                f"got {list(positions.shape)}"
            )
    elif positions.dtype == torch.int16:
        if positions.dim() != 1 or positions.shape[0] != values.shape[0]:
            raise ValueError(
                f"{name}: {prefix}positions of dtype int16 must be [nnz] = [{values.shape[0]}], "
                f"got {list(positions.shape)}"
            )
    else:
        raise TypeError(f"{name}: {prefix}positions must be uint8 or int16, got {positions.dtype}")


def check_mask(mask: Tensor, values: Tensor, name: str) -> None:
    """Raise unless ``mask`` is one of ``values`` ``[m, n]``, as bools or as bits."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: mask must be a tensor, got {type(mask).__name__}")
    m, n = values.shape
    if mask.dtype == torch.bool:
        if mask.shape != values.shape:
            raise ValueError(f"{name}: mask of dtype bool must be [m, n] = {[m, n]}, got {list(mask.shape)}")
    elif mask.dtype == torch.uint8:
        if mask.dim() != 2 or mask.shape[0] != m or mask.shape[1] != (n + 7) // 8:
            raise ValueError(
                f"{name}: mask of dtype uint8 must be [m, ceil(n / 8)] = {[m, (n + 7) // 8]}, "
                f"got {list(mask.shape)}"
            )
    else:
        raise TypeError(f"{name}: mask must be bool, or uint8 as pack_mask makes it, got {mask.dtype}")
    if mask.device != values.device:
        raise ValueError(f"{name}: mask must be on the values' device {values.device}, got {mask.device}")
