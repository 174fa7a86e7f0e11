"""The rows of the suite of low-rank + sparse weights: the weight reconstructed, and linear layers with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..formats.lowrank_sparse import MODES
from .cases import DTYPES, check_keys
from .chain_cases import read_dtype

BUDGET = 0.1
"""Share of the dense parameters that the factors may have where no rank is given, as in the source."""
_KEYS = ("out", "in", "rank", "rows", "sparsity", "mode", "dtype", "spread")


@dataclass(frozen=True)
class SparseCase:
    """``W = A B + M * S`` (or ``(1 - M) * A B + M * S``), ``[c_out, c_in]``, of rank ``rank``.

    ``sparsity`` is the share of entries that M hides. ``spread`` says how uneven the rows of M are: the
    standard deviation of the logarithm of what scaled each before the largest entries were kept; 0 for
    entries anywhere. ``rows`` None reconstructs W; a number multiplies so
    many rows of an input with it: packed for inference, in its training form in training. ``layout``
    "weight" or "linear" says which, so that the two are summed up apart. ``dtype`` None stands for each one
    the run asks for.
    """

    c_out: int
    c_in: int
    rank: int
    rows: int | None = None
    sparsity: float = 0.9
    mode: Literal["additive", "masking"] = "additive"
    dtype: str | None = None
    layout: str = "weight"
    spread: float = 0.0

    @property
    def nnz(self) -> int:
        """Entries of S that M keeps."""
        return self.c_out * self.c_in - round(self.sparsity * self.c_out * self.c_in)

    def macs(self) -> int:
        """Of the weight ``m r n``, of rows ``rows (r (m + n) + nnz)``."""
        if self.rows is None:
            return self.c_out * self.rank * self.c_in
        return self.rows * (self.rank * (self.c_out + self.c_in) + self.nnz)

    def dense_macs(self) -> int:
        """``rows m n``; none where W is reconstructed."""
        return (self.rows or 0) * self.c_out * self.c_in

    def elements(self) -> tuple[int, int, int]:
        """Elements of what is read, of what is written, and of the factors (packed: and of what is kept).

        Masks and positions, bits and 16-bit integers, count as the elements that have as many bytes.
        """
        pair, matrix = self.rank * (self.c_out + self.c_in), self.c_out * self.c_in
        bits = 8 * DTYPES[self.dtype or "float32"].itemsize
        if self.rows is None:
            return matrix + matrix // bits, matrix, pair
        positions = min(matrix, 16 * self.nnz) // bits
        return self.rows * self.c_in, self.rows * self.c_out, pair + self.nnz + positions + self.c_out

    def label(self) -> str:
        """Such as ``16 rows 1024x4096 r81 90% additive``."""
        what = "weight" if self.rows is None else f"{self.rows} rows"
        uneven = f" uneven {self.spread:g}" if self.spread else ""
        return f"{what} {self.c_out}x{self.c_in} r{self.rank} {self.sparsity:.0%} {self.mode}{uneven}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def budget_rank(c_out: int, c_in: int) -> int:
    """The largest rank whose factors have at most :data:`BUDGET` of the dense parameters; at least 1."""
    return max(1, int(BUDGET * c_out * c_in / (c_out + c_in)))


def sparse_from_dict(row: Mapping[str, Any], where: str = "case") -> SparseCase:
    """Build a case from the JSON keys out, in, rank, rows, sparsity, mode, dtype, spread; the first two are
    required.

    Raises:
        ValueError: unknown or missing keys, values out of range; the text names the case and the key.
    """
    check_keys(row, _KEYS, where)
    sizes = {key: row.get(key) for key in ("out", "in")}
    sizes |= {key: row[key] for key in ("rank", "rows") if row.get(key) is not None}
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {key} must be an int >= 1, got {value!r}")
    sparsity, mode = row.get("sparsity", 0.9), row.get("mode", "additive")
    if not isinstance(sparsity, int | float) or isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(f"{where}: sparsity must be a number in [0, 1), got {sparsity!r}")
    spread = row.get("spread", 0)
    if not isinstance(spread, int | float) or isinstance(spread, bool) or not 0 <= spread <= 10:
        raise ValueError(f"{where}: spread must be a number in [0, 10], got {spread!r}")
    if mode not in MODES:
        raise ValueError(f"{where}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    found = _case(row["out"], row["in"], row.get("rows"), sparsity, mode, row.get("rank"))
    return replace(found, dtype=read_dtype(row, where), spread=float(spread))


_WEIGHTS = ((256, 256), (1024, 1024), (3072, 768), (4096, 1024), (512, 512 * 3 * 3))
_LINEAR = ((1024, 1024), (4096, 1024), (3072, 768))
_ROWS = (1, 16, 128, 512)


LARGE = 4096 * 4096
"""Entries of a weight that fills a large GPU."""


def sparse_cases(device: str) -> list[SparseCase]:
    """Weights of common layers in both modes; linear layers at 90 % sparsity, 50 to 95 %, with uneven rows.

    On CUDA before them large ones: weights, at a rank for which memory alone counts too, and linear layers at
    the numbers of rows that the kernel is for.
    """
    large: list[SparseCase] = []
    if device == "cuda":
        large = [_case(n, n, None, 0.9, mode) for n in (4096, 8192) for mode in MODES]
        large += [_case(4096, 4096, None, 0.9, mode, 64) for mode in MODES]
        large += [_case(4096, 4096, rows, 0.9) for rows in (1, 8, 32)]
    return large + _common_cases()


def _common_cases() -> list[SparseCase]:
    found = [_case(m, n, None, 0.9, mode) for m, n in _WEIGHTS for mode in MODES]
    found += [_case(m, n, rows, 0.9) for m, n in _LINEAR for rows in _ROWS]
    found += [_case(1024, 1024, rows, s) for s in (0.5, 0.7, 0.8, 0.95) for rows in _ROWS]
    return found + [_case(1024, 1024, rows, 0.9, spread=0.6) for rows in _ROWS]


def quick_sparse() -> list[SparseCase]:
    return [
        _case(40, 33, None, 0.9),
        _case(24, 70, None, 0.5, "masking"),
        _case(40, 33, 3, 0.9),
        _case(24, 70, 20, 0.8, "masking", spread=1.0),
    ]


def _case(
    m: int,
    n: int,
    rows: int | None,
    sparsity: float,
    mode: Any = "additive",
    rank: int | None = None,
    spread: float = 0.0,
) -> SparseCase:
    layout = "weight" if rows is None else "linear"
    return SparseCase(m, n, rank or budget_rank(m, n), rows, sparsity, mode, None, layout, spread)
