"""A factorized layer in training, beside the dense weight it comes from, which fades out."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..plan import get_plan
from ..plan.cost import predict
from ..plan.select import choose
from .base import FactorizedLayer

Start = Literal["residual", "lora"]
STARTS: tuple[Start, ...] = ("residual", "lora")
_LAST_FACTOR = {"tucker2": "factor_out", "svd": "a"}
_LIMIT = 256


class FadingDense(nn.Module):
    """``y = g conv(x; D) + layer(x)``: a frozen dense weight D beside a factorized one; linear layers alike.

    The form for training a factorized layer that must not begin with the error of its decomposition: with
    g = 1 the sum is the dense layer, and with g = 0 the factorized one alone, which :meth:`finalize` returns.
    D and g are buffers and take no gradient. Where it is predicted to be faster both are one convolution with
    the weight ``g D + W(factors)``, made at each call.

    Args:
        layer: the factorized layer; its parameters are those of this one.
        residual: D, of the shape of the layer's dense weight.

    Cost: with P output positions and a dense weight of ``n`` entries ``P n`` MACs beside those of the layer;
    in one convolution ``P n`` and those of rebuilding the weight.

    Raises:
        ValueError: a residual of another shape. TypeError: a layer that is not factorized.

    Source: Progressive Model Compression with Adaptive Rank Selection in Tucker Decomposition.
    """

    layer: FactorizedLayer
    residual: Tensor
    gate: Tensor

    def __init__(self, layer: FactorizedLayer, residual: Tensor) -> None:
        super().__init__()
        if not isinstance(layer, FactorizedLayer):
            raise TypeError(f"FadingDense: layer must be factorized, got {type(layer).__name__}")
        if residual.shape != layer.weight.shape:
            raise ValueError(
                f"FadingDense: residual must be {list(layer.weight.shape)}, got {list(residual.shape)}"
            )
        self.layer = layer
        like = layer.weight.factors[0]
        self.register_buffer("residual", residual.detach().to(like.device, like.dtype))
        self.register_buffer("gate", torch.ones((), dtype=like.dtype, device=like.device))
        self._rebuilds: dict[tuple[Any, ...], bool] = {}
        self.training = layer.training

    @classmethod
    @torch.no_grad()
    def of(cls, layer: FactorizedLayer, dense: Tensor, start: Start = "residual") -> Self:
        """The layer beside what its weight lacks of a dense one, so that both together are that one.

        Args:
            layer: of a decomposition of ``dense``.
            dense: the weight both begin with.
            start: "residual": the layer as it is, and ``D = dense - W(factors)``. "lora": the factor that is
                applied last is set to zero, and ``D = dense``.

        Raises:
            ValueError: another start, "lora" of a format other than "tucker2" and "svd", another shape.
        """
        if start not in STARTS:
            raise ValueError(f"FadingDense: start must be one of {', '.join(STARTS)}, got {start!r}")
        if start == "residual":
            low = layer.weight.to_dense().detach()
            if low.shape != dense.shape:
                raise ValueError(f"FadingDense: dense must be {list(low.shape)}, got {list(dense.shape)}")
            return cls(layer, (dense.detach().double() - low.double()).to(dense.dtype))
        if layer.format not in _LAST_FACTOR:
            names = ", ".join(sorted(_LAST_FACTOR))
            raise ValueError(f"FadingDense: start 'lora' is for formats {names}, got {layer.format!r}")
        made = cls(layer, dense.detach().clone())
        getattr(layer.weight, _LAST_FACTOR[layer.format]).zero_()
        return made

    @property
    def weight(self) -> nn.Module:
        """The factors."""
        return self.layer.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """That of the layer."""
        return self.layer.bias

    @torch.no_grad()
    def fade(self, gate: float) -> None:
        """Set g.

        Raises:
            ValueError: outside [0, 1].
        """
        if not 0.0 <= gate <= 1.0:
            raise ValueError(f"FadingDense: gate must be in [0, 1], got {gate}")
        self.gate.fill_(gate)

    def finalize(self) -> FactorizedLayer:
        """The factorized layer alone, with the parameters it has; exact once g is 0."""
        self.layer.train(self.training)
        return self.layer

    def to_dense(self) -> Tensor:
        """``g D + W(factors)``, differentiable in the factors."""
        return torch.addcmul(self.layer.weight.to_dense(), self.residual, self.gate)

    def forward(self, input: Tensor) -> Tensor:
        layer = self.layer
        x = layer.as_batch(input)
        layer.check_input(x)
        if self.rebuilds(x):
            # Outside autocast: a weight rebuilt in bfloat16 would carry the rounding of two products.
            with torch.autocast(x.device.type, enabled=False):
                dense = self.to_dense()
            y = layer.geometry.apply(x, dense, layer.bias)
        else:
            # Hooks of the layer are those of the place it has in the network, and that is this one.
            y = layer.forward(x) + layer.geometry.apply(x, self.residual * self.gate)
        return y if x.dim() == input.dim() else y.squeeze(0)

    def rebuilds(self, x: Tensor) -> bool:
        """Whether one convolution with a rebuilt weight is predicted to be faster than both apart."""
        if torch.compiler.is_compiling():
            return self._fewer_macs(x)
        grad = torch.is_grad_enabled()
        key = (x.shape, x.dtype, x.device, grad, grad and x.requires_grad, self.layer.rank)
        found = self._rebuilds.get(key)
        if found is None:
            if len(self._rebuilds) >= _LIMIT:
                self._rebuilds.clear()
            found = self._rebuilds[key] = self._faster(x, grad)
        return found

    def _faster(self, x: Tensor, grad: bool) -> bool:
        layer = self.layer
        case = layer.case(x, training=grad)
        dense, plan = get_plan("dense"), choose(layer, case)
        if plan is dense:
            return True
        # One pass of the dense layer. In training the weight beside the factors is passed forward, and
        # backward to the input, but has no gradient itself.
        once = predict(dense, layer, case._replace(training=False, prefer="latency"))
        backward = grad and x.requires_grad
        apart = predict(plan, layer, case) + once * (2 if backward else 1)
        if not grad:
            return predict(dense, layer, case._replace(prefer="memory")) <= apart
        return predict(dense, layer, case) - (0.0 if backward else once) <= apart

    def _fewer_macs(self, x: Tensor) -> bool:
        """By multiply-adds alone, which a graph can be traced through."""
        layer = self.layer
        positions = layer.geometry.positions(layer.geometry.output_shape(x.shape, layer.weight.shape))
        dense = positions * math.prod(layer.weight.shape) if torch.is_grad_enabled() else 0
        passes = 3 if torch.is_grad_enabled() else 1
        return dense + passes * layer.weight.rebuild_macs() <= passes * layer.macs(x.shape)

    def extra_repr(self) -> str:
        return f"dense={tuple(self.residual.shape)}"
