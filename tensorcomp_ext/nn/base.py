"""What all factorized layers share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..formats import Format, Rank, get_format
from ..plan import PlannedLayer
from ..ranks import parse_rank, resolve_rank

STRUCTURE = ("in_modes", "out_modes", "input_order", "low_rank", "mode", "nnz", "density", "positions")
"""Options of formats that describe the factors; what else ``from_dense`` takes is for the decomposition."""

STARTS = ("decompose", "random")
"""Where factors come from that take a dense weight's place: ``start`` among the options of a format."""

_LAYERS: dict[str, type[FactorizedLayer]] = {}


class FactorizedLayer(PlannedLayer):
    """A layer with a weight in factors: ``weight`` is the format module, ``bias`` as in torch.nn."""

    kind: ClassVar[str]
    """"conv", "linear" or "embedding": which formats can hold the weight."""

    @property
    def format(self) -> str:
        """Name of the format of the weight."""
        return self.weight.name

    @property
    def rank(self) -> Rank:
        """Rank or ranks of the weight."""
        return self.weight.rank

    def clear_cache(self) -> None:
        super().clear_cache()
        gates: Any = self._modules.get("gates")
        if gates is not None:
            gates.clear_cache()

    def reset_parameters(self) -> None:
        """Random factors for a dense weight of variance ``2 / fan_in``, zero bias."""
        self.weight.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def macs(self, input_shape: Sequence[int]) -> int:
        """Multiply-adds of the factor chain for an input of ``input_shape`` (batch included)."""
        output = self.geometry.output_shape(input_shape, self.weight.shape)
        return self.weight.macs(self.geometry.positions(input_shape), self.geometry.positions(output))

    def dense_macs(self, input_shape: Sequence[int]) -> int:
        """Multiply-adds of the dense layer for an input of ``input_shape`` (batch included)."""
        output = self.geometry.output_shape(input_shape, self.weight.shape)
        return self.geometry.positions(output) * math.prod(self.weight.shape)

    def finalize(self) -> Self:
        """Pack a weight that has another form for training than for inference; returns the layer.

        Low-rank + sparse weights then store their factors and the entries that are left, and cannot be pruned
        further; a forced plan and tuned choices are dropped. Other weights stay as they are. The new
        parameters are no longer those an optimizer has.
        """
        made = self.weight.finalized()
        if made is not self.weight:
            trained = any(p.requires_grad for p in self.weight.parameters())
            made.train(self.training)
            self._forced, self.tuned = None, {}
            self.weight = made.requires_grad_(trained)
        return self

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """The torch.nn layer with the dense weight."""

    @abstractmethod
    def to_sequential(self) -> nn.Sequential:
        """The factors as standard torch.nn layers, for exporters that know no others."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON types from which :func:`from_config` builds the layer without its weights."""

    @classmethod
    @abstractmethod
    def _from_config(cls, config: Mapping[str, Any], device: torch.device | str | None) -> Self:
        """The layer of a :meth:`config`, uninitialised."""

    def _make_weight(
        self,
        shape: Sequence[int],
        format: str,
        rank: Any,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        structure: Mapping[str, Any],
    ) -> Format:
        options = {key: value for key, value in structure.items() if value is not None}
        ranks = resolve(rank, shape, format, **options)
        return get_format(format, self.kind).empty(shape, ranks, device=device, dtype=dtype, **options)

    def _take_dense(self, source: nn.Module, weight: Format) -> None:
        """Put a decomposed weight and the bias and state of the torch.nn layer it came from in place."""
        dense, bias = source.weight, getattr(source, "bias", None)
        assert isinstance(dense, Tensor)
        self.weight = weight.requires_grad_(dense.requires_grad)
        if isinstance(bias, Tensor):
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.train(source.training)

    def _fill(self, target: nn.Module, weight: Tensor, bias: bool = True) -> nn.Module:
        """Give a torch.nn layer a weight, this layer's bias, and this layer's state.

        Raises:
            ValueError: a layer with gates on its ranks, whose factors alone are not its weight.
        """
        if "gates" in self._modules:
            raise ValueError(
                f"{type(self).__name__}: ranks have gates, which a torch.nn layer cannot have; "
                "nn.gates.fold_gates(layer) multiplies them into the factors"
            )
        trained = any(p.requires_grad for p in self.weight.parameters())
        target.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=trained)
        if bias and self.bias is not None:
            target.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        target.training = self.training
        return target


def resolve(
    rank: Any, shape: Sequence[int], format: str, weight: Tensor | None = None, **structure: Any
) -> Rank:
    """A rank as users may give it, for a weight of ``shape``, as the format takes it.

    Args:
        structure: options of the format, such as ``in_modes``.

    Raises:
        ValueError: a rank rule that looks at the weight where there is none, or a rank out of range.
    """
    if isinstance(rank, str):
        rank = parse_rank(rank)
    if isinstance(rank, tuple) and all(type(r) is int for r in rank):
        return rank
    if type(rank) is int and format != "tucker2":
        return rank
    if weight is None:
        if not isinstance(rank, (int, float)):
            raise ValueError(
                f"rank must be an int, a tuple or a fraction for a layer without weights, got {rank!r}"
            )
        weight = torch.empty(tuple(shape), device="meta")
    found: Rank = resolve_rank(rank, weight, format, **structure)
    return found


def decomposed(
    name: str, weight: Tensor, format: str, kind: str, rank: Any, options: Mapping[str, Any]
) -> Format:
    """A dense weight in a format, at a rank as users may give it.

    Args:
        name: of the caller, for messages.
        kind: of the layer, as :func:`..formats.get_format` takes it.
        options: of the format and of its decomposition; ``start="random"`` draws the factors instead, for a
            network that is trained from there.

    Raises:
        ValueError: no rank, NaN or Inf in the weight, a rank that does not fit. TypeError: unknown option.
    """
    if rank is None:
        raise ValueError(f"{name}: rank is needed: an int, a tuple, a fraction or a rule")
    given = {key: value for key, value in options.items() if value is not None}
    start = given.pop("start", "decompose")
    if start not in STARTS:
        raise ValueError(f"{name}: start must be one of {', '.join(STARTS)}, got {start!r}")
    structure = {key: given[key] for key in STRUCTURE if key in given}
    ranks = resolve(rank, weight.shape, format, weight, **structure)
    if start == "decompose":
        return get_format(format, kind).from_dense(weight, ranks, **given)
    # Of embeddings as Glorot and Bengio 2010 have it; None is the variance of layers with ReLU.
    variance = 2.0 / sum(weight.shape) if kind == "embedding" else None
    placed: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    return get_format(format, kind).random(weight.shape, ranks, variance, **placed, **given)


def structure_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the format in a layer's configuration; older ones have none."""
    structure = config.get("structure", {})
    if not isinstance(structure, Mapping):
        raise ValueError(f"from_config: structure must be a mapping, got {type(structure).__name__}")
    return dict(structure)


LayerClass = TypeVar("LayerClass", bound=type[FactorizedLayer])


def register_layer(cls: LayerClass) -> LayerClass:
    """Class decorator that lets :func:`from_config` build the layer by its class name."""
    _LAYERS[cls.__name__] = cls
    return cls


def from_config(config: Mapping[str, Any], device: torch.device | str | None = None) -> FactorizedLayer:
    """An uninitialised layer as ``layer.config()`` described it.

    Raises:
        ValueError: an unknown layer type, or missing or unfit fields.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"from_config: expected a mapping, got {type(config).__name__}")
    name = config.get("type")
    if name not in _LAYERS:
        raise ValueError(f"from_config: type must be one of {sorted(_LAYERS)}, got {name!r}")
    try:
        return _LAYERS[name]._from_config(config, device)
    except KeyError as error:
        raise ValueError(f"from_config: {name} needs the field {error}") from error
    except TypeError as error:
        raise ValueError(f"from_config: {name}: {error}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: Any) -> torch.dtype:
    """The floating dtype of that name.

    Raises:
        ValueError: any other name.
    """
    known = {dtype_name(d): d for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
    if name not in known:
        raise ValueError(f"dtype must be one of {sorted(known)}, got {name!r}")
    return known[name]
