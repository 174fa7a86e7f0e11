"""What a format is, and the registry of formats."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tensorcomp_ext._warnings import warn

from .forms import Form

Rank = int | tuple[int, ...]
Table = tuple[dict[str, Tensor | None], tuple[str, ...]]
"""Parameters or buffers of a module, and the names that it has among them as it was made."""

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors that are what they seem: neither subclasses nor computed from others."""

_FORMATS: dict[str, type[Format]] = {}


class Merge(NamedTuple):
    """Several factors that are multiplied to one tensor."""

    macs: int
    elements: int
    """Numbers in the factors and in what comes out."""
    products: int
    """Products of two tensors, one after the other."""
    natively: bool
    """Whether our kernel makes them all in one call."""


class Format(nn.Module, ABC):
    """How a weight is stored: a set of parameters that stand for one dense tensor.

    A format knows nothing of the layer that uses it nor of the kernel that runs it.
    """

    name: ClassVar[str]
    """The name it is registered under."""
    layers: ClassVar[frozenset[str]]
    """The kinds of layer whose weight it can hold: "conv", "linear", "embedding"."""
    grouped: ClassVar[bool] = False
    """Whether it can hold the kernel ``[T, S / groups, *k]`` of a grouped convolution."""
    shrinks: ClassVar[bool] = True
    """Whether it is meant to store less than the dense weight as it stands, not only after training."""
    factor_names: tuple[str, ...]
    """Names of the parameters, as ``named_parameters`` has them, in the order the constructor takes them."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the dense weight in torch's order."""

    @property
    @abstractmethod
    def rank(self) -> Rank:
        """The rank or ranks, as the classmethods take them."""

    @property
    def structure(self) -> dict[str, Any]:
        """The options of the classmethods, in JSON types, that with shape and rank describe the factors."""
        return {}

    def bonds(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """Of each rank by name the factors that carry it, and their dims of that size, in the factors' order.

        Empty for a weight without inner ranks.
        """
        return {}

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The dense weight, differentiable in the factors."""

    def to_dense_channels_last(self) -> Tensor:
        """:meth:`to_dense` of a kernel, channels-last in memory where that costs the format no copy."""
        return self.to_dense()

    @abstractmethod
    def lower(self) -> Form:
        """The computational form, made of views of the parameters."""

    @abstractmethod
    def macs(self, in_positions: int, out_positions: int) -> int:
        """Multiply-adds of the factors for so many positions (batch times pixels, or rows) in and out."""

    @abstractmethod
    def rebuild_macs(self) -> int:
        """Multiply-adds of :meth:`to_dense`."""

    def rebuild_products(self) -> int:
        """Products of two tensors, one after the other, that :meth:`to_dense` takes."""
        return len(self.factor_names) - 1

    def merges(self) -> list[Merge]:
        """The products that :meth:`lower` makes of several factors each."""
        return []

    def rebuilds_natively(self) -> bool:
        """Whether :meth:`to_dense` makes all its products in one call of our kernel outside of tracing."""
        return False

    @classmethod
    @abstractmethod
    def factor_shapes(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of the factors of a dense ``shape`` at ``rank``, in the order of ``factor_names``."""

    @classmethod
    @abstractmethod
    def check_rank(cls, shape: Sequence[int], rank: Rank, **structure: Any) -> Rank:
        """``rank`` in canonical form, clipped with a warning to the largest useful one.

        Raises:
            ValueError: a rank below 1, the wrong number of ranks, or a structure that does not fit.
            TypeError: an option of ``structure`` that the format does not have.
        """

    @classmethod
    @abstractmethod
    def from_dense(cls, weight: Tensor, rank: Rank, **options: Any) -> Self:
        """Decompose ``weight`` (computed in float64, returned in its dtype on its device).

        Args:
            options: the format's structure, and what its decomposition takes.

        Raises:
            ValueError: NaN or Inf in ``weight``, or a rank below 1.
            TypeError: an unknown option.
        """

    @classmethod
    def from_observed(cls, weight: Tensor, observed: Tensor, rank: Rank, **options: Any) -> Self:
        """Decompose a weight of which only the entries where ``observed`` is True count.

        Minimises ``|| W * (A - L) ||`` over the L of this rank, W being 1 where observed; see
        :func:`..decompose.masked_fit`.

        Args:
            observed: bool, of the shape of ``weight``.
            options: the format's structure, and ``iterations`` and ``tol`` of the search.

        Raises:
            ValueError: a format without such a fit, an ``observed`` without a True entry, and as
                :meth:`from_dense`.
            TypeError: an ``observed`` that is not bool, an unknown option.
        """
        raise ValueError(f"{cls.name}: there is no fit of the observed entries in this format")

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors in the order of ``factor_names``."""
        return tuple(getattr(self, name) for name in self.factor_names)

    def tables(self) -> tuple[Table, ...]:
        """Where the tensors lie that the weight is made of: its factors, and buffers where it has some."""
        parameters: Any = self._parameters
        return ((parameters, self.factor_names),)

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> str | None:
        """What is wrong with the values of a state dict for this weight, beside shapes; None for nothing."""
        return None

    def finalized(self) -> Format:
        """The form for inference of a weight that has another one for training; else the weight itself."""
        return self

    @property
    def counted(self) -> int:
        """Weights without what says where they belong, as publications count them."""
        return self.numel

    @property
    def stored_bytes(self) -> int:
        """Bytes a file holds of the weight, indices included; of a training form, once it is finalized."""
        return sum(factor.numel() * factor.element_size() for factor in self.factors)

    @property
    def numel(self) -> int:
        """Stored weights."""
        return sum(factor.numel() for factor in self.factors)

    def flops(self, in_positions: int, out_positions: int) -> int:
        """Two floating-point operations for each multiply-add of :meth:`macs`."""
        return 2 * self.macs(in_positions, out_positions)

    def dense_macs(self, out_positions: int) -> int:
        """Multiply-adds of the dense layer for so many output positions."""
        return out_positions * math.prod(self.shape)

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        rank: Rank,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **structure: Any,
    ) -> Self:
        """Uninitialised factors, to be filled by a state dict or :meth:`reset_parameters`."""
        shapes = cls.factor_shapes(shape, cls.check_rank(shape, rank, **structure), **structure)
        return cls._of([torch.empty(s, device=device, dtype=dtype) for s in shapes], shape, structure)

    @classmethod
    def _of(cls, factors: Sequence[Tensor], shape: Sequence[int], structure: Mapping[str, Any]) -> Self:
        """The format made of these factors."""
        return cls(*factors)

    @classmethod
    def random(
        cls,
        shape: Sequence[int],
        rank: Rank,
        variance: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        **structure: Any,
    ) -> Self:
        """Random factors, the dense weight's entries of the given variance; see :meth:`reset_parameters`."""
        made = cls.empty(shape, rank, device=device, dtype=dtype, **structure)
        made.reset_parameters(variance, generator=generator)
        return made

    @torch.no_grad()
    def reset_parameters(
        self, variance: float | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        """Draw every factor from a normal distribution of variance ``c^2 = (v / prod R)^(1/N)``.

        N is the number of factors and the product runs over the summed ranks, so that an entry of the dense
        weight (a sum of ``prod R`` products of N entries) has variance ``v``.

        Args:
            variance: ``v``; ``2 / fan_in`` when None (He et al. 2015).

        Raises:
            ValueError: a variance of 0 or below.
        """
        if variance is None:
            variance = 2.0 / math.prod(self.shape[1:])
        if not variance > 0:
            raise ValueError(f"{self.name}: variance must be above 0, got {variance}")
        ranks = (self.rank,) if isinstance(self.rank, int) else self.rank
        deviation = (variance / math.prod(ranks)) ** (0.5 / len(self.factor_names))
        for factor in self.factors:
            factor.normal_(0.0, deviation, generator=generator)

    def forward(self) -> Tensor:
        """:meth:`to_dense`."""
        return self.to_dense()

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, rank={self.rank}"


FormatClass = TypeVar("FormatClass", bound=type[Format])


def register_format(name: str) -> Callable[[FormatClass], FormatClass]:
    """Class decorator that makes a format known under ``name``."""

    def register(cls: FormatClass) -> FormatClass:
        if name in _FORMATS:
            raise ValueError(f"register_format: {name!r} is taken by {_FORMATS[name].__qualname__}")
        cls.name = name
        _FORMATS[name] = cls
        return cls

    return register


def get_format(name: str, layer: str | None = None) -> type[Format]:
    """The format class registered under ``name``.

    Args:
        layer: "conv", "linear" or "embedding": accept only formats that can hold such a layer's weight.

    Raises:
        ValueError: unknown name, with the names there are. TypeError: no name at all.
    """
    known = format_names(layer)
    if not isinstance(name, str):
        raise TypeError(
            f"format must be a name, such as 'tt', got {name!r}; of one layer its options, such as in_modes, "
            "are arguments of their own"
        )
    if name not in known:
        kind = f" for {layer} layers" if layer else ""
        raise ValueError(f"format must be one of {known}{kind}, got {name!r}")
    return _FORMATS[name]


def format_names(layer: str | None = None) -> list[str]:
    """Names of the registered formats, or of those for the layers "conv", "linear" or "embedding"."""
    return sorted(n for n, cls in _FORMATS.items() if layer is None or layer in cls.layers)


def clip_rank(name: str, what: str, rank: object, largest: int, why: str = "the size of its mode") -> int:
    """``rank`` as an int, clipped with a warning; shared by the ``check_rank`` of all formats."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name}: {what} must be an int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"{name}: {what} must be at least 1, got {rank}")
    if rank > largest:
        warn(f"{name}: {what}={rank} is clipped to {largest}, {why}")
        return largest
    return rank


def check_factor(
    name: str, factor: object, argument: str, shape: Sequence[int | None], letters: str
) -> Tensor:
    """Raise unless ``factor`` is a floating tensor of ``shape`` (None: any size)."""
    if not isinstance(factor, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(factor).__name__}")
    if not factor.is_floating_point():
        raise TypeError(f"{name}: {argument} must be of a floating dtype, got {factor.dtype}")
    fits = len(shape) == factor.dim() and all(
        w is None or w == g for w, g in zip(shape, factor.shape, strict=True)
    )
    if not fits or min(factor.shape) < 1:
        raise ValueError(f"{name}: {argument} must be {letters}, got {list(factor.shape)}")
    return factor


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself if it is a parameter already, else a new parameter of it."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def no_structure(name: str, structure: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` for options given to a format that has none."""
    if structure:
        raise TypeError(f"{name}: takes no option {next(iter(structure))!r}")
