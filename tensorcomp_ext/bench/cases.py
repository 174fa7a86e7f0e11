"""What a benchmark row measures: a convolution's sizes, and the development list every change is measured
on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..ops.tucker2_conv import Geometry, resolve_geometry

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
}
"""By the names that results carry; "tf32" is float32 whose products torch may round to TF32 (CUDA only)."""
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

_SIZES = ("N", "S", "T", "H", "W", "r_in", "r_out")
_KEYS = (*_SIZES, "k", "stride", "padding", "dilation", "layout", "dtype")

Window = int | tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A Tucker-2 convolution ``[N, S, H, W] -> [N, T, H', W']``; ``k``, stride, padding, dilation: int or
    pair.

    ``layout`` and ``dtype`` None stand for "each one the run asks for".
    """

    N: int
    S: int
    T: int
    H: int
    W: int
    r_in: int
    r_out: int
    k: Window = 3
    stride: Window = 1
    padding: Window | str = 1
    dilation: Window = 1
    layout: str | None = None
    dtype: str | None = None

    @property
    def kernel(self) -> tuple[int, int]:
        return (self.k, self.k) if isinstance(self.k, int) else self.k

    @property
    def geometry(self) -> Geometry:
        return resolve_geometry(self.kernel, self.stride, self.padding, self.dilation)

    @property
    def output_size(self) -> tuple[int, int]:
        """H' and W'."""
        return self.geometry.output_size((self.H, self.W), self.kernel)

    def macs(self) -> int:
        """``N (H W S R_in + H' W' (kH kW R_in R_out + R_out T))``."""
        rows, columns = self.output_size
        taps = self.kernel[0] * self.kernel[1]
        core = rows * columns * self.r_out * (taps * self.r_in + self.T)
        return self.N * (self.H * self.W * self.S * self.r_in + core)

    def dense_macs(self) -> int:
        """``N H' W' kH kW S T``."""
        rows, columns = self.output_size
        return self.N * rows * columns * self.kernel[0] * self.kernel[1] * self.S * self.T

    def elements(self) -> tuple[int, int, int]:
        """Elements of the input, of the output, and of weights and bias."""
        rows, columns = self.output_size
        taps = self.kernel[0] * self.kernel[1]
        weights = self.S * self.r_in + taps * self.r_in * self.r_out + self.T * self.r_out + self.T
        return self.N * self.S * self.H * self.W, self.N * self.T * rows * columns, weights

    def label(self) -> str:
        """Short text for tables, e.g. ``8x64>64 56x56 k3 s1 r16/16`` (R_in/R_out)."""

        def text(value: Window | str) -> str:
            return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

        parts = [
            f"{self.N}x{self.S}>{self.T}",
            f"{self.H}x{self.W}",
            f"k{text(self.k)}",
            f"s{text(self.stride)}",
        ]
        if self.padding not in (1, (1, 1)):
            parts.append(f"p{text(self.padding)}")
        if self.dilation not in (1, (1, 1)):
            parts.append(f"d{text(self.dilation)}")
        return " ".join([*parts, f"r{self.r_in}/{self.r_out}"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _window(value: Any, key: str, least: int, where: str) -> Window:
    values = value if isinstance(value, list | tuple) else [value]
    good = all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values)
    if not good or len(values) not in (1, 2):
        raise ValueError(f"{where}: {key} must be an int or a pair of ints >= {least}, got {value!r}")
    return values[0] if len(values) == 1 else (values[0], values[1])


def check_keys(row: object, keys: Sequence[str], where: str) -> None:
    """Raise ``ValueError`` unless ``row`` is an object of JSON with no key but these."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object with keys {', '.join(keys)}, got {type(row).__name__}")
    unknown = sorted(set(row) - set(keys))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(keys)}")


def case_from_dict(row: Mapping[str, Any], where: str = "case") -> Case:
    """Build a case from JSON-like keys.

    ``S`` and ``H`` are required. Defaults: N = 1, T = S, W = H, k = 3, stride = 1, dilation = 1, padding =
    the value that keeps the size at stride 1 (``dilation (k - 1) // 2``), r_in = S // 4 and r_out = T // 4
    (at least 1), layout and dtype = each one the run asks for.

    Raises:
        ValueError: unknown or missing keys, values out of range; the text names the case and the key.
    """
    check_keys(row, _KEYS, where)
    missing = [key for key in ("S", "H") if key not in row]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing (S and H are required)")
    sizes = dict(row)
    sizes = {"N": 1, "T": sizes["S"], "W": sizes["H"]} | {k: v for k, v in sizes.items() if v is not None}
    for key in _SIZES:
        value = sizes.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {key} must be an int >= 1, got {value!r}")
    k = _window(sizes.get("k", 3), "k", 1, where)
    dilation = _window(sizes.get("dilation", 1), "dilation", 1, where)
    padding = sizes.get("padding", _same_padding(k, dilation))
    if not isinstance(padding, str):
        padding = _window(padding, "padding", 0, where)
    case = Case(
        **{key: sizes[key] for key in ("N", "S", "T", "H", "W")},
        r_in=sizes.get("r_in", max(1, sizes["S"] // 4)),
        r_out=sizes.get("r_out", max(1, sizes["T"] // 4)),
        k=k,
        stride=_window(sizes.get("stride", 1), "stride", 1, where),
        padding=padding,
        dilation=dilation,
        layout=sizes.get("layout"),
        dtype=sizes.get("dtype"),
    )
    for rank, mode in (("r_in", "S"), ("r_out", "T")):
        if getattr(case, rank) > getattr(case, mode):
            raise ValueError(
                f"{where}: {rank} must be at most {mode} = {sizes[mode]}, got {getattr(case, rank)}"
            )
    for key, value, known in (("layout", case.layout, LAYOUTS), ("dtype", case.dtype, DTYPES)):
        if value is not None and value not in known:
            raise ValueError(f"{where}: {key} must be one of {', '.join(known)}, got {value!r}")
    try:
        rows, columns = case.output_size
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if rows < 1 or columns < 1:
        raise ValueError(f"{where}: the padded input {case.H}x{case.W} is smaller than the dilated kernel")
    return case


def _same_padding(k: Window, dilation: Window) -> Window:
    kernel = (k, k) if isinstance(k, int) else k
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    pads = (steps[0] * (kernel[0] - 1) // 2, steps[1] * (kernel[1] - 1) // 2)
    return pads[0] if pads[0] == pads[1] else pads


def read_cases(path: Path, read: Callable[[Mapping[str, Any], str], Any] = case_from_dict) -> list[Any]:
    """Read a JSON list of cases, each by ``read`` (a Tucker-2 convolution, unless another suite's is given).

    Raises:
        ValueError: not JSON, not a list, empty, or a bad case (named by its position from 1).
        OSError: the file cannot be read.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a non-empty JSON list of cases")
    return [read(row, f"{path}: case {index}") for index, row in enumerate(rows, 1)]


def expand(cases: Iterable[Case], dtypes: Sequence[str], layouts: Sequence[str]) -> list[Case]:
    """Each case once for every dtype and layout it leaves open."""
    return [
        replace(case, dtype=dtype, layout=layout)
        for case in cases
        for dtype in ([case.dtype] if case.dtype else dtypes)
        for layout in ([case.layout] if case.layout else layouts)
    ]


_DEVELOPMENT = (
    # N, S, T, H, stride, R_in, R_out; 3x3, padding 1
    (1, 64, 64, 56, 1, 16, 16),
    (1, 64, 64, 56, 1, 17, 19),
    (1, 64, 64, 56, 1, 32, 32),
    (1, 128, 128, 28, 1, 32, 32),
    (1, 256, 256, 14, 1, 144, 141),
    (1, 512, 512, 7, 1, 31, 39),
    (1, 512, 512, 7, 1, 160, 69),
    (32, 16, 16, 32, 1, 6, 6),
    (32, 32, 32, 16, 1, 12, 12),
    (32, 64, 64, 8, 1, 16, 16),
    (8, 64, 64, 56, 1, 16, 16),
    (8, 64, 64, 32, 1, 13, 21),
    (1, 64, 128, 56, 2, 24, 40),
    (8, 128, 256, 28, 2, 48, 64),
)


def development_cases() -> list[Case]:
    """The fourteen convolutions the package is tuned on; ``--cases`` brings others."""
    return [
        Case(n, s, t, h, h, r_in, r_out, stride=stride) for n, s, t, h, stride, r_in, r_out in _DEVELOPMENT
    ]


def quick_cases() -> list[Case]:
    """Three small ones, to see in seconds that everything runs."""
    return [
        case_from_dict({"N": 1, "S": s, "H": h, "r_in": r, "r_out": q})
        for s, h, r, q in ((16, 8, 6, 6), (32, 14, 9, 17), (64, 7, 16, 16))
    ]
