"""Low-rank + sparse linear layers in training without the sum of both parts, for the plan ``staged``."""

from __future__ import annotations

import math

from torch import Tensor, addmm, mm
from torch.nn.functional import linear

from ..formats import SparseSum, TwoFactor
from ..ops.lowrank_sparse_weight import tried_weight
from .base import Plan, Stage
from .case import Case
from .geometry import Bound, LinearGeometry
from .layer import PlannedLayer


class StagedSparse(Plan):
    """``y = (x Bᵀ) Aᵀ + x (M * S)ᵀ``: both factors, and the pruned matrix as a dense one.

    The factors meet the input and the gradient, which takes ``3 r (M + N)`` MACs a row, forward and backward,
    beside those of the dense layer; to rebuild the weight and take its gradient apart ``3 r M N`` whatever
    the batch, more for fewer than ``M N / (M + N)`` rows.
    """

    def serves(self, layer: PlannedLayer) -> bool:
        form = layer.weight.lower()
        if not isinstance(form, SparseSum) or not isinstance(form.low_rank, TwoFactor):
            return False
        return not form.masking and isinstance(layer.geometry, LinearGeometry)

    def same_as(self, layer: PlannedLayer, case: Case) -> str:
        return "" if case.training else "without gradients a dense weight is made once and kept"

    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        form, pair = _form(layer)
        rows, entries = layer.geometry.positions(case.shape), form.values.numel()
        out, inner = pair.a.shape
        moved_in, moved_out = math.prod(case.shape), rows * out
        return [
            # What the mask keeps: an entry read, one written.
            Stage("linear", 0, 1, 2 * entries),
            Stage("linear", rows * entries, min(form.values.shape), moved_in + entries + moved_out),
            Stage("linear", rows * pair.b.numel(), inner, moved_in + pair.b.numel() + rows * inner),
            Stage("linear", rows * pair.a.numel(), inner, rows * inner + pair.a.numel() + 2 * moved_out),
        ]

    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        form, pair = _form(layer)
        return _product(x, pair.a, pair.b, _pruned(form), layer.bias)

    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        dtype = case.torch_dtype

        def make() -> tuple[Tensor, ...]:
            form, pair = _form(layer)
            return tuple(t.detach().to(dtype) for t in (pair.a, pair.b, _pruned(form)))

        a, b, sparse = layer.prepared("staged", dtype, make)
        return lambda x, bias: _product(x, a, b, sparse, bias)


def _pruned(form: SparseSum) -> Tensor:
    """What the mask keeps of S, zero elsewhere."""
    values, (m, n) = form.values, form.values.shape
    nothing = (values.new_empty(m, 0), values.new_empty(0, n))
    return tried_weight(*nothing, values, form.mask, mode="additive")


def _product(x: Tensor, a: Tensor, b: Tensor, sparse: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    # Turned, as [r, rows]: the library takes up to a third less time for it, here and in backward.
    low = mm(b, rows.t())
    y = addmm(linear(rows, sparse, bias), low.t(), a.t())
    return y.reshape(*x.shape[:-1], a.shape[0])


def _form(layer: PlannedLayer) -> tuple[SparseSum, TwoFactor]:
    form = layer.weight.lower()
    assert isinstance(form, SparseSum) and isinstance(form.low_rank, TwoFactor)
    return form, form.low_rank
