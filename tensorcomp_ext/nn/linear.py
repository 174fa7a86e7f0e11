"""Factorized linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..formats import TwoFactor, get_format
from ..plan import LinearGeometry
from .base import FactorizedLayer, dtype_from_name, dtype_name, register_layer, resolve
from .conv import _check_match


@register_layer
class FactorizedLinear(FactorizedLayer):
    """:class:`torch.nn.Linear` with a factorized weight; input ``[..., in_features]``.

    ``y = x W^T + bias`` with ``W`` the dense weight of the factors, computed by the plan that is fastest
    here.

    Args:
        in_features, out_features, bias: as in torch.nn.
        format: name of a format for linear layers.
        rank: int, or float in (0, 1], the fraction of the dense parameters.

    Cost: with SVD ``rows R (in + out)`` MACs.

    Raises:
        ValueError: an argument out of range, named.
    """

    kind: ClassVar[str] = "linear"
    geometry: LinearGeometry

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "svd",
        rank: Any,
    ) -> None:
        super().__init__()
        for argument, value in (("in_features", in_features), ("out_features", out_features)):
            if type(value) is not int or value < 1:
                raise ValueError(f"FactorizedLinear: {argument} must be an int >= 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.geometry = LinearGeometry()
        self.weight = self._make_weight((out_features, in_features), format, rank, device, dtype)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Module, format: str = "svd", rank: Any = None, **options: Any) -> Self:
        """Decompose a :class:`torch.nn.Linear`.

        Bias, dtype, device, training flag and requires_grad are kept.

        Args:
            rank: int, float in (0, 1] (fraction of the dense parameters) or a rule of
                ``tensorcomp_ext.ranks``.
            options: passed to the format's ``from_dense``.

        Raises:
            TypeError: another kind of layer.
            ValueError: NaN or Inf in the weight, a rank that does not fit.
        """
        name = f"{cls.__name__}.from_linear"
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name}: expected a torch.nn.Linear, got {type(linear).__name__}")
        if rank is None:
            raise ValueError(f"{name}: rank is needed: an int, a fraction or a rule")
        weight = linear.weight
        made = get_format(format, cls.kind).from_dense(
            weight, resolve(rank, weight.shape, format, weight), **options
        )
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device="meta",
            format=format,
            rank=made.rank,
        )
        layer._take_dense(linear, made)
        return layer

    @property
    def input_form(self) -> str:
        return f"[..., {self.in_features}]"

    def check_input(self, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"FactorizedLinear: x must be {self.input_form}, got {list(x.shape)}")
        _check_match("FactorizedLinear", x, self.weight.factors[0])

    def to_dense(self) -> nn.Module:
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return self._fill(dense, self.weight.to_dense())

    def to_sequential(self) -> nn.Sequential:
        """Linear in -> R without bias, then R -> out."""
        form = self.weight.lower()
        assert isinstance(form, TwoFactor)
        rank = form.a.shape[1]
        sequence = nn.Sequential(
            self._fill(nn.Linear(self.in_features, rank, bias=False, device="meta"), form.b, bias=False),
            self._fill(nn.Linear(rank, self.out_features, bias=self.bias is not None, device="meta"), form.a),
        )
        sequence.training = self.training
        return sequence

    def config(self) -> dict[str, Any]:
        return {
            "type": type(self).__name__,
            "format": self.format,
            "rank": list(self.rank) if isinstance(self.rank, tuple) else self.rank,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": dtype_name(self.weight.factors[0].dtype),
        }

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], device: torch.device | str | None) -> Self:
        rank = config["rank"]
        return cls(
            config["in_features"],
            config["out_features"],
            bool(config["bias"]),
            device,
            dtype_from_name(config["dtype"]),
            format=config["format"],
            rank=tuple(rank) if isinstance(rank, list) else rank,
        )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return f"{text}, format={self.format}, rank={self.rank}" + (
            f", plan={self.plan}" if self.plan else ""
        )
