"""Factorized convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..formats import get_format
from ..ops._transforms import transformed
from ..plan import ConvGeometry
from ..plan.case import autocast_dtype
from ..plan.memory_format import applies_channels_last, as_channels_last
from .base import FactorizedLayer, decomposed, dtype_from_name, dtype_name, register_layer, structure_of
from .sequential import convolutions

_is_compiling = torch.compiler.is_compiling

Sizes = int | Sequence[int]


def _sizes(value: Any, spatial: int, argument: str, least: int) -> tuple[int, ...]:
    sizes = (value,) * spatial if isinstance(value, int) else tuple(value)
    if len(sizes) == 1:
        sizes = sizes * spatial
    if len(sizes) != spatial or any(type(s) is not int or s < least for s in sizes):
        raise ValueError(f"{argument} must be an int or {spatial} ints >= {least}, got {value!r}")
    return sizes


class _FactorizedConv(FactorizedLayer):
    kind: ClassVar[str] = "conv"
    spatial: ClassVar[int]
    dense_class: ClassVar[type[nn.Module]]
    geometry: ConvGeometry

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        format: str = "tucker2",
        rank: Any,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **structure: Any,
    ) -> None:
        super().__init__()
        name, spatial = type(self).__name__, self.spatial
        check_groups(name, groups, format)
        if padding_mode != "zeros":
            raise ValueError(f"{name}: padding_mode must be 'zeros', got {padding_mode!r}")
        for argument, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: {argument} must be an int >= 1, got {value!r}")
        for argument, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value % groups:
                raise ValueError(f"{name}: {argument} must be a multiple of groups = {groups}, got {value}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = _sizes(kernel_size, spatial, f"{name}: kernel_size", 1)
        self.stride = _sizes(stride, spatial, f"{name}: stride", 1)
        self.dilation = _sizes(dilation, spatial, f"{name}: dilation", 1)
        self.groups, self.padding_mode = groups, padding_mode
        self.padding: tuple[int, ...] | str
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"{name}: padding must be ints, 'same' or 'valid', got {padding!r}")
            if padding == "same" and any(s != 1 for s in self.stride):
                raise ValueError(f"{name}: padding='same' needs stride 1, got stride {self.stride}")
            self.padding = padding
        else:
            self.padding = _sizes(padding, spatial, f"{name}: padding", 0)
        self.geometry = ConvGeometry(spatial, self.stride, self.padding, self.dilation, groups)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        modes = {"in_modes": in_modes, "out_modes": out_modes}
        self.weight = self._make_weight(shape, format, rank, device, dtype, {**modes, **structure})
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Module, format: str = "tucker2", rank: Any = None, **options: Any) -> Self:
        """Decompose a torch.nn convolution.

        Bias, dtype, device, training flag and requires_grad are kept.

        Args:
            conv: the torch.nn layer of the same number of dimensions, zero-padded, and ungrouped but where
                the format takes groups.
            format: name of a format for convolutions.
            rank: int, tuple (tucker2: ``(R_out, R_in)``), float in (0, 1] (fraction of the dense parameters)
                or a rule of ``tensorcomp_ext.ranks``.
            options: passed to the format's ``from_dense``: ``in_modes``, ``out_modes``, and what its
                decomposition takes.

        Raises:
            TypeError: another kind of layer.
            ValueError: grouped or not zero-padded, NaN or Inf in the weight, a rank that does not fit.
        """
        name = f"{cls.__name__}.from_conv"
        if not isinstance(conv, cls.dense_class):
            raise TypeError(
                f"{name}: expected a torch.nn.{cls.dense_class.__name__}, got {type(conv).__name__}"
            )
        c: Any = conv
        check_groups(name, c.groups, format)
        if c.padding_mode != "zeros":
            raise ValueError(f"{name}: padding_mode must be 'zeros', got {c.padding_mode!r}")
        made = decomposed(name, c.weight, format, cls.kind, rank, options)
        layer = cls(
            c.in_channels,
            c.out_channels,
            c.kernel_size,
            c.stride,
            c.padding,
            c.dilation,
            c.groups,
            bias=c.bias is not None,
            format=format,
            rank=made.rank,
            device="meta",
            **made.structure,
        )
        layer._take_dense(conv, made)
        layer.channels_last = applies_channels_last(c.weight)
        return layer

    @property
    def input_form(self) -> str:
        return f"[{', '.join(('N', str(self.in_channels), *('D', 'H', 'W')[3 - self.spatial :]))}]"

    def check_input(self, x: Tensor) -> None:
        name = type(self).__name__
        if x.dim() != self.spatial + 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"{name}: x must be {self.input_form}, got {list(x.shape)}")
        _check_match(name, x, self.weight.factors[0])
        output = self.geometry.output_shape(x.shape, self.weight.shape)
        if min(output[2:]) < 1:
            raise ValueError(
                f"{name}: the padded input {list(x.shape[2:])} is smaller than the dilated kernel "
                f"{list(self.kernel_size)} (padding {self.padding}, dilation {self.dilation})"
            )

    def as_batch(self, x: Tensor) -> Tensor:
        if x.dim() == self.spatial + 1:
            x = x.unsqueeze(0)
        fits = self.channels_last and x.dim() == self.spatial + 2
        if fits and (_is_compiling() or not transformed()):  # whose tensors have no formats
            x = as_channels_last(x)
        return x

    def to_dense(self) -> nn.Module:
        weight = self.weight.to_dense()
        every, bias = range(self.spatial), self.bias is not None
        return self._laid_out(self._fill(self._torch_conv(weight, every, self.groups, bias), weight))

    def _laid_out(self, conv: nn.Module) -> nn.Module:
        """A torch.nn convolution, in this layer's memory format."""
        kept: Any = conv.weight
        if self.channels_last:
            conv.weight = nn.Parameter(as_channels_last(kept.data), kept.requires_grad)
        return conv

    def to_sequential(self) -> nn.Sequential:
        """Standard convolutions, exact: three for Tucker-2, Tucker and TT, each with this layer's bias last.

        CP has a depthwise convolution for every spatial dim between its pointwise ones. A tensor ring repeats
        its core for every ring index, as a grouped convolution. TTM becomes a depthwise and a pointwise
        convolution, or the dense one where that is less work.
        """
        parts = convolutions(self)
        layers = []
        for place, part in enumerate(parts):
            last = place == len(parts) - 1
            made = self._torch_conv(part.weight, part.along, part.groups, last and self.bias is not None)
            layers.append(self._laid_out(self._fill(made, part.weight, bias=last)))
        sequence = nn.Sequential(*layers)
        sequence.training = self.training
        return sequence

    def _torch_conv(self, weight: Tensor, along: Sequence[int], groups: int, bias: bool) -> nn.Module:
        """A torch.nn convolution for this weight, with this layer's geometry along some of its dims."""

        def sizes(values: Sequence[int], other: int) -> tuple[int, ...]:
            return tuple(values[dim] if dim in along else other for dim in range(self.spatial))

        padding = self.padding if isinstance(self.padding, str) else sizes(self.padding, 0)
        return self.dense_class(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            sizes(self.stride, 1),
            padding,
            sizes(self.dilation, 1),
            groups,
            bias=bias,
            device="meta",
        )

    def config(self) -> dict[str, Any]:
        return {
            "type": type(self).__name__,
            "format": self.format,
            "rank": list(self.rank) if isinstance(self.rank, tuple) else self.rank,
            "structure": self.weight.structure,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            **({"groups": self.groups} if self.groups != 1 else {}),
            "bias": self.bias is not None,
            "dtype": dtype_name(self.weight.factors[0].dtype),
        }

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], device: torch.device | str | None) -> Self:
        rank = config["rank"]
        return cls(
            config["in_channels"],
            config["out_channels"],
            config["kernel_size"],
            config["stride"],
            config["padding"],
            config["dilation"],
            config.get("groups", 1),
            bias=bool(config["bias"]),
            format=config["format"],
            rank=tuple(rank) if isinstance(rank, list) else rank,
            device=device,
            dtype=dtype_from_name(config["dtype"]),
            **structure_of(config),
        )

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        if self.padding not in ((0,) * self.spatial, "valid"):
            text += f", padding={self.padding!r}"
        if self.dilation != (1,) * self.spatial:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return f"{text}, format={self.format}, rank={self.rank}" + (
            f", plan={self.plan}" if self.plan else ""
        )


def check_groups(name: str, groups: Any, format: str) -> None:
    """Raise unless a convolution in this format can have so many groups."""
    if type(groups) is not int or groups < 1:
        raise ValueError(f"{name}: groups must be an int >= 1, got {groups!r}")
    if groups != 1 and not get_format(format, "conv").grouped:
        raise ValueError(f"{name}: groups must be 1, got {groups}: format {format!r} takes no others")


def _check_match(name: str, x: Tensor, factor: Tensor) -> None:
    if x.device != factor.device:
        raise ValueError(f"{name}: x must be on the weight's device {factor.device}, got {x.device}")
    if x.dtype != factor.dtype and autocast_dtype(x.device.type) is None:
        raise TypeError(f"{name}: x must have the weight's dtype {factor.dtype}, got {x.dtype}")


@register_layer
class FactorizedConv1d(_FactorizedConv):
    """:class:`torch.nn.Conv1d` with a factorized weight; input ``[N, C_in, L]``.

    See :class:`FactorizedConv2d`.
    """

    spatial: ClassVar[int] = 1
    dense_class: ClassVar[type[nn.Module]] = nn.Conv1d


@register_layer
class FactorizedConv2d(_FactorizedConv):
    """:class:`torch.nn.Conv2d` with a factorized weight; input ``[N, C_in, H, W]`` or ``[C_in, H, W]``.

    ``y = conv2d(x, W, bias)`` with ``W`` the dense weight of the factors, computed by the plan that is
    fastest here.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as in torch.nn.
        groups: 1; another number with "lowrank_sparse" and "lowrank_sparse_packed".
        padding_mode: "zeros".
        format: name of a format for convolutions.
        rank: int, tuple (tucker2: ``(R_out, R_in)``) or float in (0, 1], the fraction of the dense
            parameters.
        in_modes, out_modes: modes of the input and output channels for formats that fold them; None for the
            format's default.
        structure: further options that describe the weight in this format, as ``low_rank`` and ``mode`` of
            "lowrank_sparse".

    Cost: with Tucker-2 ``N (H W S R_in + H' W' (kH kW R_in R_out + R_out T))`` MACs.

    Raises:
        ValueError: an argument out of range or not served, named.
    """

    spatial: ClassVar[int] = 2
    dense_class: ClassVar[type[nn.Module]] = nn.Conv2d


@register_layer
class FactorizedConv3d(_FactorizedConv):
    """:class:`torch.nn.Conv3d` with a factorized weight; input ``[N, C_in, D, H, W]``.

    See :class:`FactorizedConv2d`.
    """

    spatial: ClassVar[int] = 3
    dense_class: ClassVar[type[nn.Module]] = nn.Conv3d
