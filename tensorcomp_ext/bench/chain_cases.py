"""The rows of the chain suite: linear layers whose weight is a network of small cores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from .cases import DTYPES, check_keys
from .cores import CORES, PAIRED, Cores

LAYOUT = "rows"
_KEYS = ("format", "in", "out", "in_modes", "out_modes", "rank", "rows", "dtype")


@dataclass(frozen=True)
class ChainCase:
    """``y = x W^T + bias`` with x ``[rows, c_in]`` and W ``[c_out, c_in]`` in ``format``.

    ``dtype`` None stands for each one the run asks for. Inner ranks of TT and TTM are clipped where the modes
    beside them are smaller.
    """

    format: str
    c_in: int
    c_out: int
    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    rank: int
    rows: int
    dtype: str | None = None
    layout: str = LAYOUT

    @cached_property
    def cores(self) -> Cores:
        return CORES[self.format](self.out_modes, self.in_modes, self.rank)

    def macs(self) -> int:
        """Multiply-adds of the cheapest order in which the rows can meet the cores, merged as suits."""
        return self.cores.least(self.rows)[0]

    def dense_macs(self) -> int:
        """``rows c_in c_out``."""
        return self.rows * self.c_in * self.c_out

    def elements(self) -> tuple[int, int, int]:
        """Elements of the input, of the output, and of bias and weights as the cheapest order reads them."""
        weights = self.cores.order_weights(self.cores.least(self.rows)[1])
        return self.rows * self.c_in, self.rows * self.c_out, weights + self.c_out

    def label(self) -> str:
        """Such as ``tt 4096x16·16·16>16·16·16 r16``."""
        folded = ">".join("·".join(map(str, modes)) for modes in (self.in_modes, self.out_modes))
        return f"{self.format} {self.rows}x{folded} r{self.rank}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def chain_from_dict(row: Mapping[str, Any], where: str = "case") -> ChainCase:
    """Build a case from the JSON keys format, in, out, in_modes, out_modes, rank, rows, dtype.

    ``in`` and ``out`` may be left out, being the products of the modes; so may dtype.

    Raises:
        ValueError: unknown or missing keys, values out of range; the text names the case and the key.
    """
    check_keys(row, _KEYS, where)
    format = row.get("format")
    if format not in CORES:
        raise ValueError(f"{where}: format must be one of {', '.join(CORES)}, got {format!r}")
    modes = {key: read_modes(row, key, where) for key in ("in_modes", "out_modes")}
    if format in PAIRED and len(modes["in_modes"]) != len(modes["out_modes"]):
        raise ValueError(
            f"{where}: {format} needs as many in_modes as out_modes, got {list(modes['in_modes'])} and "
            f"{list(modes['out_modes'])}"
        )
    for key in ("in", "out"):
        product = math.prod(modes[f"{key}_modes"])
        if row.get(key, product) != product:
            raise ValueError(f"{where}: {key} must be {product}, the product of its modes, got {row[key]!r}")
    for key in ("rank", "rows"):
        value = row.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {key} must be an int >= 1, got {value!r}")
    dtype = read_dtype(row, where)
    sizes = math.prod(modes["in_modes"]), math.prod(modes["out_modes"])
    return ChainCase(format, *sizes, modes["in_modes"], modes["out_modes"], row["rank"], row["rows"], dtype)


def read_modes(row: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """A list of positive ints, at most six."""
    value = row.get(key)
    good = isinstance(value, list | tuple) and all(type(n) is int and n >= 1 for n in value)
    if not good or not value or len(value) > 6:
        raise ValueError(f"{where}: {key} must be a list of 1 to 6 ints >= 1, got {value!r}")
    return tuple(value)


def read_dtype(row: Mapping[str, Any], where: str) -> str | None:
    """The dtype of a row, None where it names none."""
    dtype = row.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def expand_dtypes(cases: Iterable[Any], dtypes: Sequence[str]) -> list[Any]:
    """Each case once for every dtype it leaves open."""
    return [
        replace(case, dtype=dtype) for case in cases for dtype in ([case.dtype] if case.dtype else dtypes)
    ]


_LINEAR = (
    # in_modes, out_modes, rank of the TT, rows
    ((16, 16, 16), (16, 16, 16), 16, (1, 4096)),
    ((8, 16, 8), (16, 16, 16), 16, (64,)),
    ((16, 16, 16), (8, 16, 8), 32, (256,)),
    ((8, 8, 12), (12, 16, 16), 24, (1, 197)),
    ((8, 8, 12), (8, 8, 12), 31, (197,)),
)
_LENET = ((5, 5, 5, 10), (5, 8, 8))


def chain_cases(device: str) -> list[ChainCase]:
    """TT at the rank of each layer, TTM and TR of the same layers at ranks 4, 8 and 16, LeNet's first
    linear layer as a ring."""
    found = []
    for format in ("tt", "ttm", "tr"):
        for ins, outs, rank, counts in _LINEAR:
            for r in (rank,) if format == "tt" else (4, 8, 16):
                found += [_case(format, ins, outs, r, rows) for rows in counts]
    return found + [_case("tr", *_LENET, rank, rows) for rank in (10, 15) for rows in (1, 128)]


def quick_chains() -> list[ChainCase]:
    """One small case of each format."""
    return [
        _case("tt", (4, 6), (6, 8), 5, 1),
        _case("ttm", (4, 3, 4), (4, 5, 2), 4, 33),
        _case("tr", (4, 6), (6, 8), 3, 64),
        _case("tr_matrix", (4, 3), (4, 5), 2, 7),
        _case("cp", (4, 6), (6, 8), 9, 16),
    ]


def _case(format: str, ins: tuple[int, ...], outs: tuple[int, ...], rank: int, rows: int) -> ChainCase:
    return ChainCase(format, math.prod(ins), math.prod(outs), ins, outs, rank, rows)
