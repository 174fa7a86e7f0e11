"""Factorized linear layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..plan import LinearGeometry
from .base import FactorizedLayer, decomposed, dtype_from_name, dtype_name, register_layer, structure_of
from .conv import _check_match
from .sequential import matrices


@register_layer
class FactorizedLinear(FactorizedLayer):
    """:class:`torch.nn.Linear` with a factorized weight; input ``[..., in_features]``.

    ``y = x W^T + bias`` with ``W`` the dense weight of the factors, computed by the plan that is fastest
    here.

    Args:
        in_features, out_features, bias: as in torch.nn.
        format: name of a format for linear layers.
        rank: int, tuple, or float in (0, 1], the fraction of the dense parameters.
        in_modes, out_modes: modes into which input and output features are folded; None for the format's
            default.
        input_order: the order in which the in modes index the input features, row-major; None for their own.
            With ``in_modes=(5, 5, 5, 10)`` for an image of height 5, width 5 and 50 channels, which torch
            flattens channels first, it is ``(2, 3, 0, 1)``.
        structure: further options that describe the weight in this format, as ``low_rank`` and ``mode`` of
            "lowrank_sparse".

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
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        input_order: Sequence[int] | None = None,
        **structure: Any,
    ) -> None:
        super().__init__()
        for argument, value in (("in_features", in_features), ("out_features", out_features)):
            if type(value) is not int or value < 1:
                raise ValueError(f"FactorizedLinear: {argument} must be an int >= 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.geometry = LinearGeometry()
        modes = {"in_modes": in_modes, "out_modes": out_modes, "input_order": input_order}
        shape = (out_features, in_features)
        self.weight = self._make_weight(shape, format, rank, device, dtype, {**modes, **structure})
        rows = self.weight.structure.get("out_modes", [out_features])
        if math.prod(rows) != out_features:
            raise ValueError(
                f"FactorizedLinear: out_modes must have the product {out_features}, got {list(rows)}"
            )
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Module, format: str = "svd", rank: Any = None, **options: Any) -> Self:
        """Decompose a :class:`torch.nn.Linear`.

        Bias, dtype, device, training flag and requires_grad are kept.

        Args:
            rank: int, tuple, float in (0, 1] (fraction of the dense parameters) or a rule of
                ``tensorcomp_ext.ranks``.
            options: passed to the format's ``from_dense``: ``in_modes``, ``out_modes``, ``input_order``, and
                what its decomposition takes.

        Raises:
            TypeError: another kind of layer.
            ValueError: NaN or Inf in the weight, a rank that does not fit.
        """
        name = f"{cls.__name__}.from_linear"
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name}: expected a torch.nn.Linear, got {type(linear).__name__}")
        made = decomposed(name, linear.weight, format, cls.kind, rank, options)
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device="meta",
            format=format,
            rank=made.rank,
            **made.structure,
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
        """Linear in -> R without bias, then R -> out, exact.

        CP, Tucker, TT and TR are merged to such a pair. One dense Linear where a pair is no less work, as for
        TTM and TR-matrix, whose cores have input and output modes alike.
        """
        parts = matrices(self)
        layers = []
        for place, matrix in enumerate(parts):
            last = place == len(parts) - 1
            bias = last and self.bias is not None
            made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias, device="meta")
            layers.append(self._fill(made, matrix, bias=last))
        sequence = nn.Sequential(*layers)
        sequence.training = self.training
        return sequence

    def config(self) -> dict[str, Any]:
        return {
            "type": type(self).__name__,
            "format": self.format,
            "rank": list(self.rank) if isinstance(self.rank, tuple) else self.rank,
            "structure": self.weight.structure,
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
            **structure_of(config),
        )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return f"{text}, format={self.format}, rank={self.rank}" + (
            f", plan={self.plan}" if self.plan else ""
        )
