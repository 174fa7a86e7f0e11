"""Factorized layers for inference that add a second tensor and rectify in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats import Format
from ..ops._transforms import transformed
from ..plan import Plan, PlannedLayer
from ..plan.layer import _PLAIN, _kind
from .base import FactorizedLayer
from .conv import FactorizedConv1d, FactorizedConv2d, FactorizedConv3d
from .linear import FactorizedLinear

_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state

Finish = Callable[..., Tensor]
"""``(x, bias, residual=None) -> y``"""


class FoldedLayer(FactorizedLayer):
    """A factorized layer with what follows it in a network: ``y = relu(layer(x) + residual)``.

    Plans of the package's own kernels add and rectify as they store the output; after the others it is done
    in place. Made by :func:`fold_layer`; for inference, though calls with gradients work.
    """

    relu: bool

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The folded layer.

        Args:
            input: as the layer takes it.
            residual: what is added before the rectification, of a shape that broadcasts to the output's.
        """
        x = input
        fits = residual is None or type(residual) in _PLAIN
        traces = _is_compiling() or _tracing_state() is not None
        if traces or type(x) not in _PLAIN or not fits or x.device.type == "meta" or transformed():
            return self._finished(self._traced(x), residual)
        batched = self.as_batch(x)
        if batched is not x:
            y = self.forward(batched, None if residual is None else self.as_batch(residual))
            return y if batched.dim() == x.dim() else y.squeeze(0)
        key = _kind(x)
        needs = self._needs_gradients(x) or (
            residual is not None and residual.requires_grad and torch.is_grad_enabled()
        )
        prepared = None if needs else self._renewed()
        if prepared is None:
            self.check_input(x)
            return self._finished(self._choose(x, (*key, needs)).run(self, x), residual)
        bound: Any = prepared.bound.get(key)
        if bound is None:
            self.check_input(x)
            bound = self.executor(self._choose(x, (*key, False)), x)
            prepared.keep(key, bound)
        result: Tensor = bound(x, self.bias, residual)
        return result

    def _finished(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.relu else y

    def executor(self, plan: Plan, x: Tensor) -> Finish:
        """The bound inference call of ``plan``, adding and rectifying included."""
        plain, relu = super().executor(plan, x), self.relu
        case = self.case(x, training=False)
        whole = None if torch.is_autocast_enabled(x.device.type) else plan.bind_folded(self, case, relu)
        shape = torch.Size(self.geometry.output_shape(x.shape, self.weight.shape))
        dtype = case.torch_dtype

        def call(x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
            fits = residual is None or (
                residual.shape == shape and residual.dtype == dtype and residual.device == x.device
            )
            if whole is not None and fits:
                return whole(x, bias, residual)
            y = plain(x, bias)
            if residual is not None:
                y = y.add_(residual) if fits else y + residual
            return y.relu_() if relu else y

        return call

    def to_dense(self) -> nn.Module:
        """Raises ``ValueError``: of a folded layer no torch.nn layer does the same."""
        raise ValueError(
            f"{type(self).__name__}: what follows the layer is folded in; use the network as it was"
        )

    def to_sequential(self) -> nn.Sequential:
        """Raises ``ValueError``, as :meth:`to_dense`."""
        self.to_dense()
        raise AssertionError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"


class FoldedLinear(FoldedLayer, FactorizedLinear):
    """:class:`FactorizedLinear` with what follows it."""


class FoldedConv1d(FoldedLayer, FactorizedConv1d):
    """:class:`FactorizedConv1d` with what follows it."""


class FoldedConv2d(FoldedLayer, FactorizedConv2d):
    """:class:`FactorizedConv2d` with what follows it."""


class FoldedConv3d(FoldedLayer, FactorizedConv3d):
    """:class:`FactorizedConv3d` with what follows it."""


_FOLDED: dict[type[PlannedLayer], type[FoldedLayer]] = {
    FactorizedLinear: FoldedLinear,
    FactorizedConv1d: FoldedConv1d,
    FactorizedConv2d: FoldedConv2d,
    FactorizedConv3d: FoldedConv3d,
}


def fold_layer(
    layer: FactorizedLayer, *, weight: Format | None = None, bias: Tensor | None = None, relu: bool = False
) -> FoldedLayer:
    """A folded layer to stand for ``layer``, which is not changed.

    Settings and tuned choices are kept, unless they are those of another format.

    Args:
        weight, bias: in the place of the layer's own; None keeps them.
        relu: rectify the output.

    Raises:
        TypeError: a layer that cannot be folded, such as an embedding.
    """
    kind = _FOLDED.get(type(layer)) or (type(layer) if isinstance(layer, FoldedLayer) else None)
    if kind is None:
        names = sorted(c.__name__ for c in _FOLDED)
        raise TypeError(f"fold_layer: layer must be one of {names}, got {type(layer).__name__}")
    made = kind.__new__(kind)
    made.__dict__ = layer.__getstate__()
    for table in ("_parameters", "_buffers", "_modules", "tuned"):
        made.__dict__[table] = dict(made.__dict__[table])
    made.relu = relu
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    if weight is not None and weight.name != layer.weight.name:
        made._forced, made.tuned = None, {}
    made.weight = layer.weight if weight is None else weight
    return made.eval()
