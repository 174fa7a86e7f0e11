"""Factorized convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..formats import BottleneckConv, get_format
from ..plan import ConvGeometry
from ..plan.case import autocast_dtype
from .base import FactorizedLayer, dtype_from_name, dtype_name, register_layer, resolve

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name, spatial = type(self).__name__, self.spatial
        if groups != 1:
            raise ValueError(f"{name}: groups must be 1, got {groups}")
        if padding_mode != "zeros":
            raise ValueError(f"{name}: padding_mode must be 'zeros', got {padding_mode!r}")
        for argument, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: {argument} must be an int >= 1, got {value!r}")
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
        self.geometry = ConvGeometry(spatial, self.stride, self.padding, self.dilation)
        shape = (out_channels, in_channels, *self.kernel_size)
        self.weight = self._make_weight(shape, format, rank, device, dtype)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Module, format: str = "tucker2", rank: Any = None, **options: Any) -> Self:
        """Decompose a torch.nn convolution.

        Bias, dtype, device, training flag and requires_grad are kept.

        Args:
            conv: the torch.nn layer of the same number of dimensions, ungrouped, zero-padded.
            format: name of a format for convolutions.
            rank: int, tuple (tucker2: ``(R_out, R_in)``), float in (0, 1] (fraction of the dense parameters)
                or a rule of ``tensorcomp_ext.ranks``.
            options: passed to the format's ``from_dense``.

        Raises:
            TypeError: another kind of layer.
            ValueError: grouped or not zero-padded, NaN or Inf in the weight, a rank that does not fit.
        """
        name = f"{cls.__name__}.from_conv"
        if not isinstance(conv, cls.dense_class):
            raise TypeError(
                f"{name}: expected a torch.nn.{cls.dense_class.__name__}, got {type(conv).__name__}"
            )
        if rank is None:
            raise ValueError(f"{name}: rank is needed: an int, a tuple, a fraction or a rule")
        c: Any = conv
        if c.groups != 1:
            raise ValueError(f"{name}: groups must be 1, got {c.groups}")
        if c.padding_mode != "zeros":
            raise ValueError(f"{name}: padding_mode must be 'zeros', got {c.padding_mode!r}")
        weight: Tensor = c.weight
        chosen = get_format(format, cls.kind)
        made = chosen.from_dense(weight, resolve(rank, weight.shape, format, weight), **options)
        layer = cls._around(c.in_channels, c.out_channels, c, made.rank, format, bias=c.bias is not None)
        layer._take_dense(conv, made)
        return layer

    @classmethod
    def _around(cls, c_in: int, c_out: int, like: Any, rank: Any, format: str, bias: bool) -> Self:
        return cls(
            c_in,
            c_out,
            like.kernel_size,
            like.stride,
            like.padding,
            like.dilation,
            bias=bias,
            format=format,
            rank=rank,
            device="meta",
        )

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
        return x.unsqueeze(0) if x.dim() == self.spatial + 1 else x

    def to_dense(self) -> nn.Module:
        dense = self._torch_conv(self.in_channels, self.out_channels, True, self.bias is not None)
        return self._fill(dense, self.weight.to_dense())

    def to_sequential(self) -> nn.Sequential:
        """Pointwise S -> R_in, spatial R_in -> R_out with this layer's geometry, pointwise R_out -> T."""
        form = self.weight.lower()
        assert isinstance(form, BottleneckConv)
        ones = (1,) * self.spatial
        first = self._torch_conv(form.point_in.shape[0], form.point_in.shape[1], False, False)
        core = self._torch_conv(form.core.shape[1], form.core.shape[0], True, False)
        last = self._torch_conv(
            form.point_out.shape[1], form.point_out.shape[0], False, self.bias is not None
        )
        sequence = nn.Sequential(
            self._fill(first, form.point_in.t().unflatten(1, (-1, *ones)), bias=False),
            self._fill(core, form.core, bias=False),
            self._fill(last, form.point_out.unflatten(1, (-1, *ones))),
        )
        sequence.training = self.training
        return sequence

    def _torch_conv(self, c_in: int, c_out: int, spatial: bool, bias: bool) -> nn.Module:
        if not spatial:
            return self.dense_class(c_in, c_out, 1, bias=bias, device="meta")
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        return self.dense_class(c_in, c_out, *geometry, bias=bias, device="meta")

    def config(self) -> dict[str, Any]:
        return {
            "type": type(self).__name__,
            "format": self.format,
            "rank": list(self.rank) if isinstance(self.rank, tuple) else self.rank,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
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
            bias=bool(config["bias"]),
            format=config["format"],
            rank=tuple(rank) if isinstance(rank, list) else rank,
            device=device,
            dtype=dtype_from_name(config["dtype"]),
        )

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        if self.padding not in ((0,) * self.spatial, "valid"):
            text += f", padding={self.padding!r}"
        if self.dilation != (1,) * self.spatial:
            text += f", dilation={self.dilation}"
        if self.bias is None:
            text += ", bias=False"
        return f"{text}, format={self.format}, rank={self.rank}" + (
            f", plan={self.plan}" if self.plan else ""
        )


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
        groups: 1.
        padding_mode: "zeros".
        format: name of a format for convolutions.
        rank: int, tuple (tucker2: ``(R_out, R_in)``) or float in (0, 1], the fraction of the dense
            parameters.

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
