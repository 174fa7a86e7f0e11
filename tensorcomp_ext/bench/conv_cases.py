"""The rows of the conv suite: convolutions of CP and of tensor-ring form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from .cases import Case, Window, case_from_dict

FORMATS = ("cp", "tr")
_OWN = ("format", "rank")
_WINDOW = ("N", "S", "T", "H", "W", "k", "stride", "padding", "dilation", "layout", "dtype")


@dataclass(frozen=True)
class ConvCase:
    """A convolution ``[N, S, H, W] -> [N, T, H', W']`` with one rank for all of its cores or factors.

    ``layout`` and ``dtype`` None stand for "each one the run asks for".
    """

    format: str
    rank: int
    N: int
    S: int
    T: int
    H: int
    W: int
    k: Window = 3
    stride: Window = 1
    padding: Window | str = 1
    dilation: Window = 1
    layout: str | None = None
    dtype: str | None = None

    @cached_property
    def window(self) -> Case:
        """The same convolution with no ranks: sizes, window, dense cost."""
        kept = {name: getattr(self, name) for name in _WINDOW}
        return Case(**kept, r_in=1, r_out=1)

    def factor_shapes(self) -> list[tuple[int, ...]]:
        """CP: ``[T, R] [S, R] [kH, R] [kW, R]``; TR: ``[R, S, R] [R, kH kW, R] [R, T, R]``."""
        rows, columns = self.window.kernel
        if self.format == "cp":
            return [(n, self.rank) for n in (self.T, self.S, rows, columns)]
        return [(self.rank, n, self.rank) for n in (self.S, rows * columns, self.T)]

    def stage_macs(self) -> int:
        """Multiply-adds of the three stages: ``HW S A + H'W' (core + T B)`` an image, a core shared by the
        ring taking ``R kH kW R R``, a depthwise one ``kH kW R``."""
        rows, columns = self.window.output_size
        taps = self.window.kernel[0] * self.window.kernel[1]
        width = self.rank if self.format == "cp" else self.rank**2
        core = taps * (self.rank if self.format == "cp" else self.rank**3)
        return self.N * (self.H * self.W * self.S * width + rows * columns * (core + self.T * width))

    def macs(self) -> int:
        """The fewer of the stages' and the dense convolution's, which a ring of high rank exceeds."""
        return min(self.stage_macs(), self.dense_macs())

    def dense_macs(self) -> int:
        return self.window.dense_macs()

    def elements(self) -> tuple[int, int, int]:
        """Elements of the input, of the output, and of factors and bias."""
        inputs, outputs, _ = self.window.elements()
        weights = self.T
        for shape in self.factor_shapes():
            size = 1
            for n in shape:
                size *= n
            weights += size
        return inputs, outputs, weights

    def label(self) -> str:
        """Such as ``tr 32x16>16 32x32 k3 s1 r10``."""
        return f"{self.format} {self.window.label().rsplit(' ', 1)[0]} r{self.rank}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def conv_from_dict(row: Mapping[str, Any], where: str = "case") -> ConvCase:
    """Build a case from JSON-like keys: format and rank, and those of a Tucker-2 case without its ranks.

    Raises:
        ValueError: unknown or missing keys, values out of range; the text names the case and the key.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
    known = (*_OWN, *_WINDOW)
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    format, rank = row.get("format"), row.get("rank")
    if format not in FORMATS:
        raise ValueError(f"{where}: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{where}: rank must be an int >= 1, got {rank!r}")
    rest = {key: value for key, value in row.items() if key not in _OWN}
    window = case_from_dict(rest | {"r_in": 1, "r_out": 1}, where)
    return ConvCase(format, rank, **{name: getattr(window, name) for name in _WINDOW})


def conv_cases(device: str) -> list[ConvCase]:
    """The 3x3 convolutions of ResNet-32 as rings, and of ResNet-18 in CP form."""
    rings = [
        ConvCase("tr", rank, n, s, s, h, h)
        for s, h in ((16, 32), (32, 16), (64, 8))
        for rank in (10, 15)
        for n in (1, 32)
    ]
    return rings + [
        ConvCase("cp", rank, 1, s, s, h, h)
        for s, h in ((64, 56), (128, 28), (256, 14))
        for rank in (16, 32, 64, 128)
    ]


def quick_convs() -> list[ConvCase]:
    return [ConvCase("tr", 3, 2, 8, 6, 7, 9), ConvCase("cp", 9, 1, 12, 16, 10, 10)]
