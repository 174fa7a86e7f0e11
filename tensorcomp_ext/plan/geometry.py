"""How a layer moves over its input: what a plan must know of a layer beside its weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Bound = Callable[[Tensor, Tensor | None], Tensor]
"""A layer ready to run for one kind of input, its weights inside: ``(x, bias) -> y``."""

FoldedBound = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""The same with what follows the layer in its network: ``(x, bias, residual) -> relu(y + residual)``."""

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(ABC):
    """How a weight meets an input."""

    spatial: int
    """Number of spatial dimensions; 0 for a linear layer."""

    @abstractmethod
    def apply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None
    ) -> Tensor:
        """The dense layer with ``weight``, its channels in so many groups; None for those of the layer."""

    @abstractmethod
    def pointwise(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply the channels by ``matrix`` ``[out, in]`` at every position."""

    @abstractmethod
    def bind(self, weight: Tensor) -> Bound:
        """:meth:`apply` with everything but x and bias fixed, for the least overhead."""

    def prepare(self, weight: Tensor) -> Tensor:
        """A dense weight as :meth:`bind` takes it; not the tensor itself where it is changed."""
        return weight

    @abstractmethod
    def output_shape(self, shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the output for an input of ``shape``."""

    @abstractmethod
    def positions(self, shape: Sequence[int]) -> int:
        """Positions (batch times pixels, or rows) of an input or output of ``shape``."""


@dataclass(frozen=True)
class ConvGeometry(Geometry):
    """Stride, padding and dilation in the spelling of torch.nn; ``spatial`` is 1, 2 or 3."""

    spatial: int
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1

    def apply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None
    ) -> Tensor:
        groups = self.groups if groups is None else groups
        return _CONVOLUTIONS[self.spatial](x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def pointwise(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        kernel = matrix.reshape(*matrix.shape, *(1,) * self.spatial)
        return _CONVOLUTIONS[self.spatial](x, kernel, bias)

    def bind(self, weight: Tensor) -> Bound:
        convolution = _CONVOLUTIONS[self.spatial]
        windows = (self.stride, self.padding, self.dilation, self.groups)
        return lambda x, bias: convolution(x, weight, bias, *windows)

    def output_shape(self, shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, ...]:
        sizes = []
        for d in range(self.spatial):
            reach = self.dilation[d] * (weight_shape[2 + d] - 1)
            pads = (
                {"same": reach, "valid": 0}[self.padding]
                if isinstance(self.padding, str)
                else 2 * self.padding[d]
            )
            sizes.append((shape[2 + d] + pads - reach - 1) // self.stride[d] + 1)
        return shape[0], weight_shape[0], *sizes

    def positions(self, shape: Sequence[int]) -> int:
        return shape[0] * math.prod(shape[2:])

    def same_is_uneven(self, weight_shape: Sequence[int]) -> bool:
        """Whether "same" padding needs one pixel more on one side than on the other."""
        reaches = [d * (size - 1) for d, size in zip(self.dilation, weight_shape[2:], strict=True)]
        return self.padding == "same" and any(reach % 2 for reach in reaches)

    def symmetric_padding(self, weight_shape: Sequence[int]) -> list[int]:
        """Padding of each dimension as ints, where :meth:`same_is_uneven` does not hold."""
        if not isinstance(self.padding, str):
            return list(self.padding)
        if self.padding == "valid":
            return [0] * self.spatial
        return [d * (size - 1) // 2 for d, size in zip(self.dilation, weight_shape[2:], strict=True)]


@dataclass(frozen=True)
class LinearGeometry(Geometry):
    """A matrix applied to the last dimension."""

    spatial: int = 0

    def apply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None
    ) -> Tensor:
        return F.linear(x, weight, bias)

    def pointwise(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, bias)

    def bind(self, weight: Tensor) -> Bound:
        linear = torch.nn.functional.linear
        return lambda x, bias: linear(x, weight, bias)

    def output_shape(self, shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, ...]:
        return *shape[:-1], weight_shape[0]

    def positions(self, shape: Sequence[int]) -> int:
        return math.prod(shape[:-1])
